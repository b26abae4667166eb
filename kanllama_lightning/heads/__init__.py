"""Every head of this folder, so that a config may name it by its short name."""

import importlib
import pkgutil

from kanllama_lightning.heads.batch_topk import BatchTopK
from kanllama_lightning.heads.bent_dictionary import BentDictionary
from kanllama_lightning.heads.controls import (
    FrozenDecoder,
    FrozenEncoder,
    SoftlyFrozenDecoder,
    WideBatchTopK,
)
from kanllama_lightning.heads.curved_dictionary import CurvedDictionary
from kanllama_lightning.heads.dense_kan import DenseKANReLU, DenseOnlyKAN
from kanllama_lightning.heads.gain_latent import GainLatent
from kanllama_lightning.heads.gated import Gated
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.jump_relu import JumpReLU
from kanllama_lightning.heads.kan import KANEncoder
from kanllama_lightning.heads.kan_direct import KANDirect
from kanllama_lightning.heads.kan_relu_dense import KANReLUDense
from kanllama_lightning.heads.linear_map import LinearMap
from kanllama_lightning.heads.matryoshka import Matryoshka
from kanllama_lightning.heads.mlp import MLPEncoder
from kanllama_lightning.heads.only_kan import OnlyKAN
from kanllama_lightning.heads.pca import PCA
from kanllama_lightning.heads.spline_hidden import SplineHidden
from kanllama_lightning.heads.spline_input import SplineInput
from kanllama_lightning.heads.spline_latent import SplineLatent
from kanllama_lightning.heads.standard import Standard
from kanllama_lightning.heads.topk import TopK

__all__ = [
    "PCA",
    "BatchTopK",
    "BentDictionary",
    "CurvedDictionary",
    "DenseKANReLU",
    "DenseOnlyKAN",
    "FrozenDecoder",
    "FrozenEncoder",
    "GainLatent",
    "Gated",
    "JumpReLU",
    "KANDirect",
    "KANEncoder",
    "KANReLUDense",
    "LinearMap",
    "MLPEncoder",
    "Matryoshka",
    "OnlyKAN",
    "SAEHead",
    "SoftlyFrozenDecoder",
    "SplineHidden",
    "SplineInput",
    "SplineLatent",
    "Standard",
    "TopK",
    "WideBatchTopK",
]

# a head is a file in here, and named nowhere else
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
