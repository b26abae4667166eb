"""Every head, so that a config may name it by its short name."""

from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.heads.batch_topk import BatchTopK
from kanllama_lightning.heads.kan import KANEncoder
from kanllama_lightning.heads.pca import PCA
from kanllama_lightning.heads.topk import TopK

__all__ = ["PCA", "BatchTopK", "KANEncoder", "SAEHead", "TopK"]
