"""Every architecture by the name that it has in configurations and files."""

from pipeline.sae.base import SparseAutoencoder
from pipeline.sae.batch_topk import BatchTopKSAE
from pipeline.sae.gated import GatedSAE
from pipeline.sae.jumprelu import JumpReluSAE
from pipeline.sae.relu import ReluSAE
from pipeline.sae.switch import SwitchSAE
from pipeline.sae.tokenized import TokenizedSAE
from pipeline.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    cls.architecture: cls
    for cls in (
        TopKSAE,
        BatchTopKSAE,
        ReluSAE,
        GatedSAE,
        JumpReluSAE,
        TokenizedSAE,
        SwitchSAE,
    )
}
