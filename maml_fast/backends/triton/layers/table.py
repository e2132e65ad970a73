"""Every layer by its name in the graph."""

from __future__ import annotations

from ....graph.graph import ACTIVATIONS
from .boxes import Boxes
from .dense import Activation, Add, Affine, Cat, Linear, Transpose
from .families import Constant, Expression, Parameter
from .given import Check, Draw, Input, Target
from .image_layers import AvgPool, Convolution, MaxPool, SpatialMean, Upsample
from .kinds import Kind
from .lookups import Lookup
from .norms import BatchNorm, ImageNorm, RowNorm
from .products import Matmul
from .rows import Maximum, Softmax

KINDS: dict[str, Kind] = {
    "linear": Linear(),
    **dict.fromkeys(ACTIVATIONS, Activation()),
    "batch_norm": BatchNorm(),
    "running_norm": BatchNorm(),
    "layer_norm": RowNorm(),
    "group_norm": ImageNorm(),
    "conv": Convolution(),
    "max_pool": MaxPool(),
    "avg_pool": AvgPool(),
    "spatial_mean": SpatialMean(),
    "upsample": Upsample(),
    "affine": Affine(),
    "add": Add(),
    "cat": Cat(),
    "transpose": Transpose(),
    "parameter": Parameter(),
    "constant": Constant(),
    "target": Target(),
    "input": Input(),
    "draw": Draw(),
    "check": Check(),
    "lookup": Lookup(),
    "pointwise": Expression(),
    "linear_map": Boxes(),
    "matmul": Matmul(),
    **dict.fromkeys(("softmax", "log_softmax"), Softmax()),
    "max": Maximum(),
}
"""A new layer is one class and one line here."""
