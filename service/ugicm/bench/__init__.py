"""``ugicm bench``: how fast the codec is here, stage by stage, beside its peers and the processor's peak."""
