"""Small models of random weights that find something in any image, as runs that the programs can load."""

import numpy as np
from tensorpack.compat import tfv1 as tf

from common import checkpoint, weights
from config import Config
from inference.graph import Inference

SETTINGS = (
    *("BACKBONE.WIDTH=4", "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]", "FPN.NUM_CHANNEL=8", "RPN.HEAD_DIM=16"),
    *("FPN.FRCNN_FC_HEAD_DIM=8", "MRCNN.HEAD_DIM=8", "PREPROC.TEST_SHORT_EDGE_SIZE=90", "PREPROC.MAX_SIZE=150"),
    *("RPN.ANCHOR_SIZES=[16,32,64,96,128]", "RPN.TEST_PER_LEVEL_NMS_TOPK=100", "RPN.TEST_POST_NMS_TOPK=100"),
    *("DATA.NUM_CATEGORY=3", "DATA.CLASS_NAMES=['BG','disc','box','häuschen']"),
    *("TEST.RESULT_SCORE_THRESH=0.05", "TEST.RESULTS_PER_IM=12"),
)
MODELS = {
    "c4": ("MODE_FPN=False",),
    "fpn": ("MODE_FPN=True",),
    "cascade": ("MODE_FPN=True", "FPN.CASCADE=True"),
    "boxes": ("MODE_FPN=True", "MODE_MASK=False"),
}


def make_model(folder, name, *overrides):
    """Makes the run of one of MODELS in a folder, and returns the folder. `overrides`: texts KEY=VALUE, for others."""
    settings = Config()
    settings.update([*SETTINGS, *MODELS[name], *overrides])
    checkpoint.save_config(settings, folder / "config.json")
    with tf.Graph().as_default(), tf.Session() as session:
        Inference(settings)
        session.run(tf.global_variables_initializer())
        weights.assign(session, _random_kernels(np.random.default_rng(0)))
        tf.train.Saver().save(session, str(folder / "model-1"))
    return folder


def _random_kernels(rng):
    """By name, whatever else is in the graph; in the last layers so large that scores, boxes and masks differ."""
    kernels = {}
    for name, variable in sorted(weights.model_variables().items()):
        shape = variable.shape.as_list()
        is_last = name.endswith(("/class/W", "/box/W")) or name == "maskrcnn/conv/W"
        if name.endswith("/W"):
            kernels[variable] = rng.normal(0, 0.3 if is_last else np.sqrt(2 / np.prod(shape[:-1])), shape)
    return kernels
