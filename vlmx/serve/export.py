"""How does a trained model leave vlmx? As a transformers LLaVA where the encoder is a CLIP ViT, else in its parts.

LLaVA: one `LlavaForConditionalGeneration` with the frozen encoder inside, and a processor. It needs a CLIP ViT that saw
square photos, the connector mlp2, and a Llama. The parts: the connector as safetensors, the LLM as a Hugging Face
folder, and a README whose code puts them together; visual tokens come from a cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vlmx.cache_specs.fused import FusedSpec
from vlmx.cache_specs.spec import CacheSpec
from vlmx.errors import RunError, SpecMismatchError, UsageError
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.models.adapters import merged, transposed_layers
from vlmx.models.connectors import build_connector
from vlmx.models.folder import SavedModel, card_from_dict, load_model, save_model
from vlmx.models.llm import load_llm, no_progress_bars
from vlmx.models.prompts import VICUNA_SYSTEM, PlainPrompt, VicunaPrompt, choose_prompt
from vlmx.models.rope import round_positions
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder
from vlmx.serve.clip_tower import tower_config, tower_state
from vlmx.serve.export_readme import llava_readme, parts_readme

Layout = Literal["auto", "llava", "parts"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
IMAGE_TOKEN = "<image>"


def export_run(
    run: RunFolder,
    out: Path,
    *,
    step: str | None = None,
    layout: Layout = "auto",
    dtype: torch.dtype = torch.float32,
    weights: str | None = None,
) -> Layout:
    """Write the model of a run into a new folder.

    Args:
        run: the run.
        out: the folder; it must not exist, or be empty.
        step: number of a checkpoint, or "best"; None for the model at the end of the training.
        layout: "llava", "parts", or "auto" for the first of them that is possible.
        dtype: of the weights.
        weights: the encoder's checkpoint, for LLaVA; None to look it up.

    Returns:
        The layout that was written.

    Raises:
        RunError: the run has no such model.
        UsageError: the folder is in use, or the layout is not possible; says why.
        WeightsError: weights of the LLM or of the encoder are missing or damaged.
        SpecMismatchError: the encoder's weights are not those that the run was trained with.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already", fix="give a new folder with -o")
    saved = load_model(run.path / "model") if step is None else model_of_step(run, step)
    reasons = [] if layout == "parts" else why_not_llava(saved)
    backbone = None
    if layout != "parts" and not reasons:
        backbone = _encoder(saved.card.spec, weights)
        reasons = [reason for reason in [_why_no_tower(backbone)] if reason]
    if layout == "llava" and reasons:
        raise UsageError("this model is no LLaVA", why="; ".join(reasons), fix="export its parts: --layout parts")
    saved.vlm.to(dtype)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if backbone is None or reasons:
        written: Layout = "parts"
        _write_parts(partial, saved, reasons)
    else:
        written = "llava"
        _write_llava(partial, saved, backbone.to("cpu"), dtype)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return written


def model_of_step(run: RunFolder, step: str) -> SavedModel:
    """The model as it was at a checkpoint, adapters merged.

    Args:
        run: the run.
        step: a number, or "best".

    Raises:
        RunError: there is no such checkpoint, or it is damaged.
    """
    from vlmx.train.checkpoints import read_record, read_weights, saved_steps, verify
    from vlmx.train.keeper import best_steps

    folder = run.path / "checkpoints"
    steps = saved_steps(folder)
    ranked = best_steps(folder, steps) if step == "best" else [s for s in steps if str(s) == step]
    if not ranked:
        raise RunError(
            f"{run.path} has no checkpoint '{step}'",
            why=f"it has those of the steps {', '.join(map(str, steps)) or '(none)'}",
            fix="give one of these, or best; or leave --step out for the model at the end",
        )
    record = read_record(folder, ranked[0])
    verify(folder, record)
    card = card_from_dict(record.card)
    llm, tokenizer = load_llm(card.llm)
    connector = build_connector(card.connector, card.dim_vision, card.dim_llm)
    prompt = choose_prompt(card.prompt, tokenizer)
    vlm = VLM(connector, llm, visual_at=prompt.visual_at, eos_ids=prompt.end_ids)
    lora = run.config.get("lora") or {}
    state = read_weights(folder, record.step)
    if lora.get("r") is not None:
        state = _merged_into(vlm, state, r=lora["r"], alpha=lora["alpha"])
    vlm.load_state_dict({**vlm.state_dict(), **state})
    if card.rope == "bf16":
        round_positions(llm)
    return SavedModel(vlm=vlm.eval(), prompt=prompt, card=card)


def why_not_llava(saved: SavedModel) -> list[str]:
    """What of a model has no place in transformers' LLaVA, as far as its card tells; empty if all has."""
    card, spec = saved.card, saved.card.spec
    text_model = saved.vlm.llm.config.get_text_config().model_type
    geometry = spec.geometry
    reasons = []
    if card.connector != "mlp2":
        reasons.append(f"its connector is {card.connector}, not mlp2")
    if text_model != "llama":
        reasons.append(f"its LLM is a {text_model}, not a llama")
    if isinstance(spec, FusedSpec):
        reasons.append("it joins several encoders")
    elif geometry.fill != tuple(int(255 * level) for level in spec.mean):
        reasons.append("its photos are padded with another colour than their mean")
    if card.rope == "bf16":
        reasons.append("its LLM learned with rounded rotary positions (rope=bf16), which LLaVA does not compute")
    if geometry.mode != "letterbox" or geometry.height != geometry.width or geometry.crop_pct != 1.0:
        reasons.append("its photos are not simply padded to a square")
    return reasons


def _merged_into(vlm: VLM, state: Mapping[str, Tensor], *, r: int, alpha: float) -> dict[str, Tensor]:
    """The trained tensors over the frozen ones of a plain model that they adapt, as those of the plain model."""
    base = vlm.state_dict()
    adapted = {name.partition(".lora_")[0] for name in state if ".lora_" in name}
    frozen = {f"{stem}.base_layer.weight": base[f"{stem}.weight"] for stem in adapted}
    return merged({**frozen, **state}, r=r, alpha=alpha, transposed=transposed_layers(vlm))


def _encoder(spec: Any, weights: str | None) -> Backbone:
    """The encoder that a cache was made with."""
    assert isinstance(spec, CacheSpec)
    options: dict[str, Any] = {}
    if spec.feature.startswith("blocks."):
        options["block"] = int(spec.feature.removeprefix("blocks."))
    source = weights or (spec.weights_sha256 if spec.random_weights else None)
    size = (spec.geometry.height, spec.geometry.width)
    backbone = build_backbone(spec.backbone, res=size, weights=source, **options)
    if backbone.weights_sha256 != spec.weights_sha256:
        raise SpecMismatchError(
            f"these are not the weights of {spec.backbone} that the run was trained with",
            why=f"SHA-256 {backbone.weights_sha256}, in the run {spec.weights_sha256}",
            fix="give the right file with --weights, or export without the encoder: --layout parts",
        )
    return backbone


def _why_no_tower(backbone: Backbone) -> str | None:
    return None if tower_config(backbone) is not None else f"{backbone.name} is no CLIP ViT"


def _write_parts(folder: Path, saved: SavedModel, reasons: list[str]) -> None:
    save_model(folder, saved.vlm, saved.prompt.tokenizer, saved.card)
    (folder / "README.md").write_text(parts_readme(saved.card, saved.prompt, reasons))


def _write_llava(folder: Path, saved: SavedModel, backbone: Backbone, dtype: torch.dtype) -> None:
    """The tower keeps the layers up to the tap and no more, so its last hidden state is what the connector takes.

    The place-holder of an image token gets the id after the tokenizer's last, and a row of zeros where the LLM has no
    row left for it; it is suppressed in generation.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision_config = tower_config(backbone)
    assert vision_config is not None
    llm, tokenizer, card = saved.vlm.llm, saved.prompt.tokenizer, saved.card
    text_config = llm.config.get_text_config()
    vocabulary = text_config.vocab_size
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = max(vocabulary, image_id + 1)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config={**text_config.to_dict(), "vocab_size": rows, "dtype": str(dtype).removeprefix("torch.")},
        image_token_index=image_id,
        image_seq_length=backbone.num_tokens,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        dtype=str(dtype).removeprefix("torch."),
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    first, _, second = saved.vlm.connector.children()  # the two layers of mlp2, GELU between them
    state = {f"model.vision_tower.{name}": value for name, value in tower_state(backbone).items()}
    for number, layer in ((1, first), (2, second)):
        for name, value in layer.state_dict().items():
            state[f"model.multi_modal_projector.linear_{number}.{name}"] = value
    for name, value in llm.state_dict().items():
        new = name if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1)
        grown = name in ("lm_head.weight", "model.embed_tokens.weight")
        state[new] = _with_rows(value, rows) if grown else value
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.generation_config = llm.generation_config
    model.generation_config.suppress_tokens = [image_id]
    model.generation_config.eos_token_id = sorted(saved.vlm.eos_ids)
    with no_progress_bars():
        model.save_pretrained(folder)
    processor = _processor(saved, backbone, tokenizer)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(llava_readme(card, saved.prompt))


def _processor(saved: SavedModel, backbone: Backbone, tokenizer: Any) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side, spec = backbone.res[0], saved.card.spec
    assert isinstance(spec, CacheSpec)
    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    system = {VicunaPrompt.name: f"{VICUNA_SYSTEM} ", PlainPrompt.name: ""}.get(saved.card.prompt)
    template = None if system is None else chat_template(system, bos=bool(saved.prompt.visual_at))
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=side // backbone.grid[0],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def chat_template(system: str, *, bos: bool) -> str:
    """The Jinja template of one question: the image stands right after BOS, as in training, wherever it was put."""
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for m in messages %}{% if m['content'] is not string %}{% for c in m['content'] %}"
        + "{% if c['type'] == 'image' %}"
        + IMAGE_TOKEN
        + "{% endif %}{% endfor %}{% endif %}{% endfor %}"
        + system
        + "{% for m in messages %}{% set text = m['content'] if m['content'] is string else"
        + " (m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ')) %}"
        + "{% if m['role'] == 'user' %}USER: {{ text | trim }} ASSISTANT:"
        + "{% else %} {{ text | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )


def _with_rows(table_VE: Tensor, rows: int) -> Tensor:
    return torch.cat([table_VE, table_VE.new_zeros(rows - len(table_VE), table_VE.shape[1])])
