"""Trees of modules as the models people train have them, and which of their parameters are pruned by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from tree_building import (
    EXPERTS,
    HIDDEN,
    VOCABULARY,
    WIDTH,
    Conv1D,
    Parameters,
    RMSNorm,
    TopKRouter,
    Tree,
    attention,
    bare,
    build,
    linear,
    swiglu,
    weights,
)


def gpt2() -> Tree:
    modules: dict[str, nn.Module] = {
        "transformer.wte": nn.Embedding(VOCABULARY, WIDTH),
        "transformer.wpe": nn.Embedding(32, WIDTH),
    }
    targets = []
    for i in range(2):
        block = f"transformer.h.{i}"
        modules |= {
            f"{block}.ln_1": nn.LayerNorm(WIDTH),
            f"{block}.attn": Parameters(bias=torch.ones(1, 1, 32, 32)),
            f"{block}.attn.c_attn": Conv1D(3 * WIDTH, WIDTH),
            f"{block}.attn.c_proj": Conv1D(WIDTH, WIDTH),
            f"{block}.ln_2": nn.LayerNorm(WIDTH),
            f"{block}.mlp.c_fc": Conv1D(4 * WIDTH, WIDTH),
            f"{block}.mlp.c_proj": Conv1D(WIDTH, 4 * WIDTH),
        }
        targets += weights(*(f"{block}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")))
    model = build(modules | {"transformer.ln_f": nn.LayerNorm(WIDTH), "lm_head": linear(VOCABULARY)})
    model.lm_head.weight = model.transformer.wte.weight
    return Tree(model, targets)


def decoder(block: Mapping[str, nn.Module]) -> nn.Module:
    """Return a Llama-like model around one block."""
    return build(
        {"model.embed_tokens": nn.Embedding(VOCABULARY, WIDTH)}
        | {f"model.layers.0.{name}": module for name, module in block.items()}
        | {"model.norm": RMSNorm(), "lm_head": linear(VOCABULARY)}
    )


def in_block(*paths: str) -> list[str]:
    return weights(*(f"model.layers.0.{path}" for path in paths))


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
SWIGLU = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def llama() -> Tree:
    block = {"input_layernorm": RMSNorm()} | attention("self_attn") | swiglu("mlp")
    return Tree(decoder(block), in_block(*ATTENTION, *SWIGLU))


def llama_of_meta() -> Tree:
    """With a head and layers of other names, and a feed-forward gate that is no router."""
    modules = {"tok_embeddings": nn.Embedding(VOCABULARY, WIDTH)}
    modules |= attention("layers.0.attention", "wq wk wv wo") | swiglu("layers.0.feed_forward", "gate w3 w2")
    modules |= {"layers.0.attention_norm": RMSNorm(), "norm": RMSNorm(), "output": linear(VOCABULARY)}
    names = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    names += ["feed_forward.gate", "feed_forward.w3", "feed_forward.w2"]
    return Tree(build(modules), weights(*(f"layers.0.{name}" for name in names)))


def mixtral() -> Tree:
    block = attention("self_attn") | {"block_sparse_moe.gate": linear(EXPERTS)}
    experts = [f"block_sparse_moe.experts.{i}" for i in range(EXPERTS)]
    for expert in experts:
        block |= swiglu(expert, "w1 w3 w2")
    names = [f"{expert}.{name}" for expert in experts for name in ("w1", "w3", "w2")]
    return Tree(decoder(block), in_block(*ATTENTION, *names))


def qwen_moe() -> Tree:
    """Experts as small as the router, a shared one with a gate of its own, and gates within the experts."""
    block: dict[str, nn.Module] = {"mlp.gate": linear(EXPERTS)}
    names = []
    for i in range(EXPERTS):
        block |= {f"mlp.experts.{i}.gate": linear(EXPERTS), f"mlp.experts.{i}.down": linear(WIDTH, EXPERTS)}
        names += [f"mlp.experts.{i}.gate", f"mlp.experts.{i}.down"]
    block |= {"mlp.shared_expert.up_proj": linear(EXPERTS), "mlp.shared_expert_gate": linear(1)}
    names.append("mlp.shared_expert.up_proj")
    return Tree(decoder(block), in_block(*names))


def gpt_oss() -> Tree:
    block = attention("self_attn") | {
        "mlp.router": TopKRouter(weight=bare(EXPERTS, WIDTH), bias=bare(EXPERTS)),
        "mlp.experts": Parameters(
            gate_up_proj=bare(EXPERTS, WIDTH, 2 * HIDDEN),
            gate_up_proj_bias=bare(EXPERTS, 2 * HIDDEN),
            down_proj=bare(EXPERTS, HIDDEN, WIDTH),
            down_proj_bias=bare(EXPERTS, WIDTH),
        ),
    }
    experts = [f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    return Tree(decoder(block), in_block(*ATTENTION) + experts)


def llama4() -> Tree:
    block = {
        "feed_forward.experts": Parameters(
            gate_up_proj=bare(EXPERTS, WIDTH, 2 * HIDDEN), down_proj=bare(EXPERTS, HIDDEN, WIDTH)
        ),
        "feed_forward.router": linear(EXPERTS),
    } | swiglu("feed_forward.shared_expert")
    targets = [f"model.layers.0.feed_forward.experts.{name}_proj" for name in ("gate_up", "down")]
    targets += in_block(*(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")))
    return Tree(decoder(block), targets)


def deepseek() -> Tree:
    """A gate of bare parameters with as many rows as there are experts."""
    block: dict[str, nn.Module] = {
        "mlp.gate": Parameters(weight=bare(EXPERTS, WIDTH), e_score_correction_bias=bare(EXPERTS))
    }
    names = []
    for i in range(EXPERTS):
        block |= swiglu(f"mlp.experts.{i}")
        names += [f"mlp.experts.{i}.{name}_proj" for name in ("gate", "up", "down")]
    return Tree(decoder(block), in_block(*names))


def switch_transformer() -> Tree:
    """Routers of several levels, one beside experts of attention, and one that holds its experts."""
    block = {
        "mlp.router.classifier": linear(EXPERTS),
        "mlp.experts.expert_0.wi": linear(HIDDEN),
        "mlp.experts.expert_0.wo": linear(WIDTH, HIDDEN),
        "attention.experts.router.layer": linear(EXPERTS),
        "router_block.gate.wg": linear(EXPERTS),
        "router_block.experts.0.wi": linear(HIDDEN),
    }
    return Tree(
        decoder(block), in_block("mlp.experts.expert_0.wi", "mlp.experts.expert_0.wo", "router_block.experts.0.wi")
    )


def vit() -> Tree:
    layer = "encoder.layers.encoder_layer_0"
    modules = {
        "conv_proj": nn.Conv2d(3, WIDTH, 4),
        f"{layer}.ln_1": nn.LayerNorm(WIDTH),
        f"{layer}.self_attention": nn.MultiheadAttention(WIDTH, 2),
        f"{layer}.mlp.0": linear(HIDDEN, bias=True),
        f"{layer}.mlp.3": linear(WIDTH, HIDDEN, bias=True),
        "encoder.ln": nn.LayerNorm(WIDTH),
        "heads.head": linear(10, bias=True),
    }
    model = build(modules)
    model.class_token = bare(1, 1, WIDTH)
    model.encoder.pos_embedding = bare(1, 5, WIDTH)
    attention = [f"{layer}.self_attention.in_proj_weight", f"{layer}.self_attention.out_proj.weight"]
    return Tree(model, weights("conv_proj") + attention + weights(f"{layer}.mlp.0", f"{layer}.mlp.3", "heads.head"))


def clip() -> Tree:
    """Two towers, with the bare projections of the original one."""
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    model = build(
        {
            f"{text}.token_embedding": nn.Embedding(VOCABULARY, WIDTH),
            f"{text}.position_embedding": nn.Embedding(8, WIDTH),
            f"{vision}.patch_embedding": nn.Conv2d(3, WIDTH, 4, bias=False),
            f"{vision}.position_embedding": nn.Embedding(9, WIDTH),
            "visual_projection": linear(8),
        }
    )
    model.get_submodule(vision).class_embedding = bare(WIDTH)
    model.text_projection = bare(WIDTH, 8)
    model.positional_embedding = bare(8, WIDTH)
    model.logit_scale = nn.Parameter(torch.ones(()))
    return Tree(model, ["text_projection", f"{vision}.patch_embedding.weight", "visual_projection.weight"])


def resnet() -> Tree:
    modules = {"conv1": nn.Conv2d(3, 8, 7, bias=False), "bn1": nn.BatchNorm2d(8)}
    for i in (1, 2):
        modules |= {f"layer1.0.conv{i}": nn.Conv2d(8, 8, 3, bias=False), f"layer1.0.bn{i}": nn.BatchNorm2d(8)}
    modules |= {"layer1.0.downsample.0": nn.Conv2d(8, 8, 1, bias=False), "layer1.0.downsample.1": nn.BatchNorm2d(8)}
    model = build(modules | {"fc": nn.Linear(8, 5)})
    return Tree(model, weights("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.downsample.0", "fc"))


def t5() -> Tree:
    shared = nn.Embedding(VOCABULARY, WIDTH)
    modules: dict[str, nn.Module] = {"shared": shared}
    targets = []
    for stack in ("encoder", "decoder"):
        layer = f"{stack}.block.0.layer"
        modules |= {f"{stack}.embed_tokens": shared} | attention(f"{layer}.0.SelfAttention", "q k v o")
        modules |= {
            f"{layer}.0.SelfAttention.relative_attention_bias": nn.Embedding(32, 4),
            f"{layer}.0.layer_norm": RMSNorm(),
            f"{layer}.1.DenseReluDense.wi": linear(HIDDEN),
            f"{layer}.1.DenseReluDense.wo": linear(WIDTH, HIDDEN),
            f"{stack}.final_layer_norm": RMSNorm(),
        }
        targets += weights(*(f"{layer}.0.SelfAttention.{name}" for name in "qkvo"))
        targets += weights(f"{layer}.1.DenseReluDense.wi", f"{layer}.1.DenseReluDense.wo")
    return Tree(build(modules | {"lm_head": linear(VOCABULARY)}), targets)


def bert() -> Tree:
    """The head is a module of any name whose weight is the word embedding."""
    layer = "bert.encoder.layer.0"
    model = build(
        {
            "bert.embeddings.word_embeddings": nn.Embedding(VOCABULARY, WIDTH),
            "bert.embeddings.position_embeddings": nn.Embedding(32, WIDTH),
            "bert.embeddings.LayerNorm": nn.LayerNorm(WIDTH),
            f"{layer}.attention.self.query": linear(bias=True),
            f"{layer}.attention.output.dense": linear(bias=True),
            f"{layer}.attention.output.LayerNorm": nn.LayerNorm(WIDTH),
            "bert.pooler.dense": linear(bias=True),
            "cls.predictions.decoder": linear(VOCABULARY, bias=True),
            "cls.seq_relationship": linear(2, bias=True),
        }
    )
    names = ["attention.self.query", "attention.output.dense"]
    return Tree(model, weights(*(f"{layer}.{name}" for name in names), "bert.pooler.dense", "cls.seq_relationship"))


def language_model_of_lstms() -> Tree:
    modules = {
        "encoder.embedding": nn.Embedding(VOCABULARY, WIDTH),
        "rnn": nn.LSTM(WIDTH, 12, num_layers=2, bidirectional=True, proj_size=4),
        "cell": nn.GRUCell(8, 12),
        "decoder": linear(VOCABULARY, 12, bias=True),
    }
    suffixes = [f"_l{layer}{direction}" for layer in range(2) for direction in ("", "_reverse")]
    recurrent = [f"rnn.weight_{kind}{suffix}" for suffix in suffixes for kind in ("ih", "hh", "hr")]
    return Tree(build(modules), [*recurrent, "cell.weight_ih", "cell.weight_hh"])


def one_input_series() -> Tree:
    """Weights that look like vectors."""
    model = build({"rnn": nn.GRU(1, 12), "head": linear(1, 12, bias=True), "bilinear": nn.Bilinear(3, 4, 2)})
    return Tree(model, ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight", "bilinear.weight"])


def whisper() -> Tree:
    encoder, decoder = "model.encoder", "model.decoder"
    modules = {
        f"{encoder}.conv1": nn.Conv1d(8, WIDTH, 3),
        f"{encoder}.conv2": nn.Conv1d(WIDTH, WIDTH, 3),
        f"{encoder}.embed_positions": nn.Embedding(30, WIDTH),
    } | attention(f"{encoder}.layers.0.self_attn", "q_proj k_proj v_proj out_proj")
    modules |= {
        f"{decoder}.embed_tokens": nn.Embedding(VOCABULARY, WIDTH),
        f"{decoder}.embed_positions": nn.Embedding(20, WIDTH),
        f"{decoder}.layers.0.fc1": linear(HIDDEN, bias=True),
        f"{decoder}.layer_norm": nn.LayerNorm(WIDTH),
    }
    model = build(modules | {"proj_out": linear(VOCABULARY)})
    model.get_submodule(f"{encoder}.embed_positions").weight.requires_grad_(False)
    model.proj_out.weight = model.get_submodule(f"{decoder}.embed_tokens").weight
    projections = [f"{encoder}.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return Tree(model, weights(f"{encoder}.conv1", f"{encoder}.conv2", *projections, f"{decoder}.layers.0.fc1"))


def swin() -> Tree:
    block = "layers.0.blocks.0"
    model = build(
        {
            "patch_embed.proj": nn.Conv2d(3, WIDTH, 4),
            "patch_embed.norm": nn.LayerNorm(WIDTH),
            f"{block}": Parameters(attn_mask=torch.zeros(4, 9, 9)),
            f"{block}.norm1": nn.LayerNorm(WIDTH),
            f"{block}.attn": Parameters(
                relative_position_bias_table=bare(25, 2), relative_position_index=torch.zeros(9, 9, dtype=torch.long)
            ),
            f"{block}.attn.qkv": linear(3 * WIDTH, bias=True),
            f"{block}.attn.proj": linear(bias=True),
            "layers.0.downsample.norm": nn.LayerNorm(WIDTH),
            "layers.0.downsample.reduction": linear(2 * WIDTH),
            "head": linear(10, bias=True),
        }
    )
    names = [f"{block}.attn.qkv", f"{block}.attn.proj", "layers.0.downsample.reduction", "head"]
    return Tree(model, weights("patch_embed.proj", *names))


def convnext() -> Tree:
    """Scales with the dimensions of an image."""
    block = "stages.0.0"
    model = build(
        {
            f"{block}": Parameters(gamma=bare(8)),
            f"{block}.conv_dw": nn.Conv2d(8, 8, 7, groups=8),
            f"{block}.norm": nn.LayerNorm([8, 4, 4]),
            f"{block}.mlp.fc1": linear(32, 8, bias=True),
            f"{block}.mlp.grn": Parameters(weight=bare(1, 1, 1, 32), bias=bare(1, 1, 1, 32)),
            "up": nn.ConvTranspose2d(8, 4, 2),
        }
    )
    return Tree(model, weights(f"{block}.conv_dw", f"{block}.mlp.fc1", "up"))


def mamba() -> Tree:
    mixer = "backbone.layers.0.mixer"
    model = build(
        {
            "backbone.embeddings": nn.Embedding(VOCABULARY, WIDTH),
            f"{mixer}": Parameters(A_log=bare(HIDDEN, 4), D=bare(HIDDEN)),
            f"{mixer}.conv1d": nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN),
            f"{mixer}.in_proj": linear(2 * HIDDEN),
            f"{mixer}.x_proj": linear(9, HIDDEN),
            f"{mixer}.dt_proj": linear(HIDDEN, 1, bias=True),
            f"{mixer}.out_proj": linear(WIDTH, HIDDEN),
            "backbone.layers.0.norm": RMSNorm(),
            "lm_head": linear(VOCABULARY),
        }
    )
    names = ("conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")
    return Tree(model, weights(*(f"{mixer}.{name}" for name in names)))


def unet() -> Tree:
    attention_path = "down_blocks.0.attentions.0.transformer_blocks.0"
    resnet_path = "down_blocks.0.resnets.0"
    model = build(
        {
            "conv_in": nn.Conv2d(4, WIDTH, 3),
            "time_embedding.linear_1": linear(HIDDEN, bias=True),
            "time_embedding.linear_2": linear(HIDDEN, HIDDEN, bias=True),
            "class_embedding": nn.Embedding(11, HIDDEN),
            f"{resnet_path}.norm1": nn.GroupNorm(4, WIDTH),
            f"{resnet_path}.conv1": nn.Conv2d(WIDTH, WIDTH, 3),
            f"{resnet_path}.time_emb_proj": linear(WIDTH, HIDDEN, bias=True),
            f"{attention_path}.norm1.linear": linear(2 * WIDTH),
            f"{attention_path}.attn2.to_q": linear(),
            f"{attention_path}.attn2.to_out.0": linear(bias=True),
            f"{attention_path}.ff.net.0.proj": linear(HIDDEN, bias=True),
            "conv_norm_out": nn.GroupNorm(4, WIDTH),
            "conv_out": nn.Conv2d(WIDTH, 4, 3),
        }
    )
    names = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2"]
    names += [f"{resnet_path}.conv1", f"{resnet_path}.time_emb_proj"]
    names += [f"{attention_path}.{name}" for name in ("norm1.linear", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj")]
    return Tree(model, weights(*names, "conv_out"))


def query_transformer() -> Tree:
    """Learned tokens and tables of many names."""
    model = build({"layer.query": linear(bias=True), "layer.r": linear()})
    shapes = {"query_tokens": (1, 8, WIDTH), "latents": (8, WIDTH), "anything": (1, 8, WIDTH), "probe": (1, 1, WIDTH)}
    for name, shape in (shapes | {"mix": (1, WIDTH), "start": (1, 8, 4, 4)}).items():
        model.register_parameter(name, bare(*shape))
    model.layer.rel_pos_h = bare(7, 4)
    model.layer.r_w_bias = bare(2, 8)
    model.layer.q = bare(WIDTH, 2, 8)
    return Tree(model, ["layer.q", "layer.query.weight", "layer.r.weight"])


def segment_anything() -> Tree:
    """Few learned tokens, as many as a head has outputs."""
    model = build(
        {
            "prompt_encoder.no_mask_embed": nn.Embedding(1, WIDTH),
            "mask_decoder.iou_token": nn.Embedding(1, WIDTH),
            "mask_decoder.mask_tokens": nn.Embedding(4, WIDTH),
            "positions": nn.Embedding(40, 10),
            "mask_decoder.iou_head": linear(4),
            "mask_decoder.mlp": linear(40),
        }
    )
    return Tree(model, weights("mask_decoder.iou_head", "mask_decoder.mlp"))


def wrapped() -> Tree:
    """Tables and layers under the names that wrappers put around them."""
    model = build(
        {
            "embed_tokens._fsdp_wrapped_module": nn.Embedding(VOCABULARY, WIDTH),
            "embeddings.0": nn.Embedding(7, WIDTH),
            "token_embed.base_layer": nn.Embedding(7, WIDTH),
            "x_embedder": linear(bias=True),
            "final_norm": linear(bias=True),
            "layer._fsdp_wrapped_module": linear(),
        }
    )
    return Tree(model, weights("x_embedder", "final_norm", "layer._fsdp_wrapped_module"))


def lora() -> Tree:
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    model = build(
        {
            f"{path}.base_layer": linear(),
            f"{path}.lora_A.default": linear(2, WIDTH),
            f"{path}.lora_B.default": linear(WIDTH, 2),
            "base_model.model.score.modules_to_save.default": linear(3),
        }
    )
    return Tree(model, weights(f"{path}.base_layer", "base_model.model.score.modules_to_save.default"))


TREES: dict[str, Callable[[], Tree]] = {
    make.__name__: make
    for make in (
        *(gpt2, llama, llama_of_meta, mixtral, qwen_moe, gpt_oss, llama4, deepseek, switch_transformer),
        *(vit, clip, resnet, t5, bert, language_model_of_lstms, one_input_series, whisper, swin, convnext, mamba, unet),
        *(query_transformer, segment_anything, wrapped, lora),
    )
}
