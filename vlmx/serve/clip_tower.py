"""What is a timm CLIP ViT in transformers' names? The configuration and weights of a `CLIPVisionModel`.

Both follow OpenAI's CLIP (Radford et al., arXiv 2103.00020): a class token, position embeddings for it and the patches,
a norm before the blocks, and pre-norm blocks. timm keeps query, key and value in one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmx.extract.backbones.base import Backbone
from vlmx.extract.backbones.timm_models import TimmViT

_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EMBEDDINGS = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "norm_pre.weight": "pre_layrnorm.weight",
    "norm_pre.bias": "pre_layrnorm.bias",
}


def tower_config(backbone: Backbone) -> dict[str, Any] | None:
    """The `CLIPVisionConfig` of the layers up to the tap, as plain data; None if the backbone is no CLIP ViT."""
    if not isinstance(backbone.net, TimmViT) or backbone.res[0] != backbone.res[1]:
        return None
    net: Any = backbone.net.net
    patch = int(net.patch_embed.patch_size[0])
    block = net.blocks[0]
    activation = {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(type(block.mlp.act).__name__)
    is_clip = (
        isinstance(net.norm_pre, nn.LayerNorm)
        and activation is not None
        and backbone.res[0] % patch == 0
        and set(tower_names(backbone)) == set(net.state_dict())
        and net.pos_embed.shape[1] == 1 + backbone.num_tokens
    )
    if not is_clip:
        return None
    return {
        "model_type": "clip_vision_model",
        "hidden_size": net.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": backbone.res[0],
        "patch_size": patch,
        "hidden_act": activation,
        "layer_norm_eps": float(net.norm_pre.eps),
    }


def tower_names(backbone: Backbone) -> list[str]:
    """The names that timm's parameters of a CLIP ViT have, for as many blocks as there are."""
    net: Any = backbone.net.net
    names = ["cls_token", "pos_embed", *_EMBEDDINGS]
    for number in range(len(net.blocks)):
        for part in (*_BLOCK, "attn.qkv"):
            names += [f"blocks.{number}.{part}.{kind}" for kind in ("weight", "bias")]
    return names


def tower_state(backbone: Backbone) -> dict[str, Tensor]:
    """The state dict of the `CLIPVisionModel`; the norm after the last layer, which LLaVA does not use, is neutral."""
    net: Any = backbone.net.net
    state: dict[str, Tensor] = net.state_dict()
    width = net.embed_dim
    result = {
        "embeddings.class_embedding": state["cls_token"].reshape(width),
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "post_layernorm.weight": torch.ones(width),
        "post_layernorm.bias": torch.zeros(width),
        **{new: state[old] for old, new in _EMBEDDINGS.items()},
    }
    for number in range(len(net.blocks)):
        old, new = f"blocks.{number}", f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            for timm_name, name in _BLOCK.items():
                result[f"{new}.{name}.{kind}"] = state[f"{old}.{timm_name}.{kind}"]
            thirds = state[f"{old}.attn.qkv.{kind}"].chunk(3)
            for name, third in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=True):
                result[f"{new}.self_attn.{name}.{kind}"] = third
    return result
