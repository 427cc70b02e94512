"""Published runs that ``gmp-kernels plan`` knows, with the layers of the models that they are about."""

from __future__ import annotations

from typing import NamedTuple

from gmp_kernels.stages import Stages
from gmp_kernels.tools.plan import Plan

__all__ = ["PRESETS", "Preset", "bert_base_layers", "llama_1b_layers", "resnet50_layers"]


def resnet50_layers() -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the prunable weights of torchvision's ResNet-50: 53 convolutions and the classifier.

    Source: K. He et al., "Deep residual learning for image recognition", 2016, table 1.
    """
    layers: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            layers[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            layers[f"{name}.conv2.weight"] = (width, width, 3, 3)
            layers[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            if block == 0:
                layers[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
            channels = 4 * width
    layers["fc.weight"] = (1000, channels)
    return layers


def bert_base_layers() -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the matrices in the 12 encoder layers of BERT-base, six in each.

    Source: J. Devlin et al., "BERT", 2019, section 3: 768 hidden units, 3072 in the feed-forward networks.
    """
    square, up, down = (768, 768), (3072, 768), (768, 3072)
    shapes = {
        "attention.self.query": square,
        "attention.self.key": square,
        "attention.self.value": square,
        "attention.output.dense": square,
        "intermediate.dense": up,
        "output.dense": down,
    }
    return {f"bert.encoder.layer.{i}.{name}.weight": shape for i in range(12) for name, shape in shapes.items()}


def llama_1b_layers() -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the matrices in the 16 decoder layers of Llama 3.2 1B, seven in each.

    Source: the model's published configuration: 2048 hidden units, 8192 in the feed-forward networks, 8 heads of 64 for
    keys and values.
    """
    shapes = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048),
        "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    }
    return {f"model.layers.{i}.{name}.weight": shape for i in range(16) for name, shape in shapes.items()}


class Preset(NamedTuple):
    """Run that comes with the package.

    Attributes
    ----------
    plan : Plan
    about : str
        Model, data, and whatever is ours rather than the source's.
    source : str
        Publication.
    """

    plan: Plan
    about: str
    source: str


IMAGENET_STEPS = 5005  # 1 281 167 images in batches of 256
SQUAD_STEPS = 5475  # 87 599 questions in batches of 16

PRESETS = {
    # 5% at epoch 1, an update per epoch, 90% at epoch 35, held to epoch 60.
    "blog": Preset(
        Plan(Stages(1, 34, 25, steps_per_epoch=IMAGENET_STEPS), resnet50_layers()),
        "the standard example, here with ResNet-50 on ImageNet in batches of 256; learning rates are ours",
        'M. Kurtz, "An intro to gradual magnitude pruning", Neural Magic blog',
    ),
    # 5% to 85% over epochs 2 to 37, fine-tuning to 57; learning rate 0.01, 0.001 at epoch 43, 0.0001 at epoch 50.
    "resnet50": Preset(
        Plan(Stages(2, 35, 20, steps_per_epoch=IMAGENET_STEPS), resnet50_layers(), final_sparsity=0.85),
        "ResNet-50 on ImageNet in batches of 256, to 85% and with a longer stabilization",
        "none; a variant of blog",
    ),
    "bert": Preset(
        Plan(
            Stages(2, 18, 10, steps_per_epoch=SQUAD_STEPS),
            bert_base_layers(),
            initial_sparsity=0.0,
            frequency=0.01,
            learning_rate=3e-5,
            weight_decay=0.0,
            finetuning_lr="linear",
        ),
        "BERT-base on SQuAD in batches of 16, 100 updates per epoch; learning rates are ours",
        "SparseML, recipe bert-base-12layers_prune90",
    ),
    "gmp-star": Preset(
        Plan(
            Stages(2, 24, 4, steps_per_epoch=SQUAD_STEPS),
            bert_base_layers(),
            initial_sparsity=0.7,
            frequency=4,
            scope="global",
            learning_rate=8e-5,
            weight_decay=0.0,
            pruning_lr="rewind",
            finetuning_lr="linear",
        ),
        "BERT-base on SQuAD in batches of 16: a first step to 70%, and the learning rate set back every 4 epochs; the "
        "epochs and learning rates are those of SparseML's recipe for oBERT",
        "E. Kurtic and D. Alistarh, GMP*, 2022, arXiv:2210.06384",
    ),
    # The publication counts compute. An epoch here is a hundredth of the run.
    "llm-pretraining": Preset(
        Plan(
            Stages(25, 50, 25, steps_per_epoch=1000),
            llama_1b_layers(),
            initial_sparsity=0.0,
            final_sparsity=0.8,
            learning_rate=3e-4,
            weight_decay=0.1,
            pruning_lr="cosine",
            finetuning_lr="linear",
        ),
        "pre-training with pruning from 25% to 75% of the run, of which an epoch is 1%; sparsity, learning rates and "
        "layers, which are those of Llama 3.2 1B, are ours",
        "T. Jin et al., The journey matters, ICLR 2025, arXiv:2501.12486",
    ),
}
