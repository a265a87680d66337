"""How good a codec is: real bitstreams, counted whole, against other codecs in the same run."""
