"""Every architecture by the name that it has in configurations and files."""

from pipeline.sae.base import SparseAutoencoder
from pipeline.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {cls.architecture: cls for cls in (TopKSAE,)}
