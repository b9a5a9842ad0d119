"""What does the README of an exported model say? What it is, what its input has to be, and code that runs."""

from __future__ import annotations

from collections.abc import Sequence

from vlmx.cache_specs.spec import CacheSpec
from vlmx.models.chat import ChatPrompt
from vlmx.models.folder import ModelCard
from vlmx.models.prompts import VICUNA_SYSTEM, PlainPrompt, Prompt, VicunaPrompt

_LAYERS = {
    "linear": "nn.Linear({d}, {e})",
    "mlp2": "nn.Sequential(nn.Linear({d}, {e}), nn.GELU(), nn.Linear({e}, {e}))",
    "mlp3": "nn.Sequential(nn.Linear({d}, {w}), nn.GELU(), nn.Linear({w}, {e}), nn.GELU(), nn.Linear({e}, {e}))",
}
_PLACE = ("before all text", "right after BOS")
_ROPE = '''

def rounded(module, args, kwargs, output):
    """Cosines and sines of positions that are computed in bfloat16, as they were in training."""
    positions_BT = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    phases_BTF = positions_BT[..., None].to(torch.bfloat16) * module.inv_freq.to(torch.bfloat16)
    phases_BTF = torch.cat((phases_BTF, phases_BTF), dim=-1)
    return tuple((turn(phases_BTF) * module.attention_scaling).to(output[0].dtype) for turn in (torch.cos, torch.sin))


for module in llm.modules():
    if hasattr(module, "inv_freq"):
        module.register_forward_hook(rounded, with_kwargs=True)
'''
_TEXTS = {
    VicunaPrompt.name: f'f"{VICUNA_SYSTEM} USER: {{question.strip()}} ASSISTANT:"',
    PlainPrompt.name: 'f"USER: {question.strip()} ASSISTANT:"',
}


def parts_readme(card: ModelCard, prompt: Prompt, reasons: Sequence[str]) -> str:
    """The README of connector and LLM in their own folders.

    Args:
        card: of the model.
        prompt: its prompt format.
        reasons: why it is no LLaVA; empty if that was not asked.
    """
    why = f"It is not one transformers model because {'; '.join(reasons)}.\n\n" if reasons else ""
    return f"""# {card.spec.name} + {card.connector} + LLM

A vision-language model in its parts. {why}\
`connector.safetensors` maps visual tokens [images, {card.grid[0] * card.grid[1]}, {card.dim_vision}] to embeddings of
the LLM in `llm/`; `model.json` says all of it in one place. The visual tokens stand
{_PLACE[prompt.visual_at]}, wherever the image is mentioned in the text.{_rope_text(card)}

{_encoder_text(card)}

The code below needs torch, transformers and safetensors, and to be run in this folder.

```python
{parts_code(card, prompt)}```

With vlmx: `vlmx.models.folder.load_model(folder)` reads this folder, too.
"""


def parts_code(card: ModelCard, prompt: Prompt) -> str:
    """Python that loads the parts and defines `answer(visual_ND, question)`."""
    sizes = {"d": card.dim_vision, "e": card.dim_llm, "w": 4 * card.dim_vision}
    if card.connector in _LAYERS:
        layers, imports = _LAYERS[card.connector].format(**sizes), ""
    else:
        imports = "from vlmx.models.connectors import build_connector\n"
        layers = f'build_connector("{card.connector}", {card.dim_vision}, {card.dim_llm})'
    return f"""import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
llm = AutoModelForCausalLM.from_pretrained("llm").eval()
tokenizer = AutoTokenizer.from_pretrained("llm")
connector = {layers}
connector.load_state_dict(load_file("connector.safetensors"))
connector.to(llm.dtype).eval()
{_ROPE if card.rope == "bf16" else ""}

def embeddings(visual_ND, question):
    \"\"\"The LLM's input: visual tokens of one image, and a question about it.\"\"\"
{_prompt_code(prompt)}
    text = llm.get_input_embeddings()(torch.tensor([ids]))
    visual = connector(visual_ND[None].to(llm.dtype))
    return torch.cat([text[:, :{prompt.visual_at}], visual, text[:, {prompt.visual_at}:]], dim=1)


@torch.inference_mode()
def answer(visual_ND, question, max_new_tokens=128):
    output = llm.generate(
        inputs_embeds=embeddings(visual_ND, question),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()
"""


def llava_readme(card: ModelCard, prompt: Prompt) -> str:
    """The README of a transformers LLaVA."""
    if isinstance(prompt, ChatPrompt):
        ask = f"""# The image token stands {_PLACE[prompt.visual_at]}; the rest is the LLM's own chat template.
question = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is this?"}}], add_generation_prompt=True, tokenize=False
){_lead_code(prompt)}
at = len(tokenizer.bos_token) if {bool(prompt.visual_at)} else 0
inputs = processor(
    images=image, text=question[:at] + "<image>" + question[at:], return_tensors="pt", add_special_tokens=False
)"""
    else:
        ask = """content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}])
inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)"""
    return f"""# {card.spec.name} + {card.connector} + LLM

A vision-language model as a transformers `LlavaForConditionalGeneration`: frozen encoder, connector and LLM.

{_encoder_text(card)} The processor pads and resizes photos the same way; its resize differs from the one of the cache
by rounding.

```python
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(".").eval()
processor, tokenizer = AutoProcessor.from_pretrained("."), AutoTokenizer.from_pretrained(".")
image = Image.open("photo.jpg").convert("RGB")
{ask}
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
print(answer)
```
"""


def _prompt_code(prompt: Prompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return (
            '    messages = [{"role": "user", "content": question.strip()}]\n'
            "    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
            f'{_lead_code(prompt)}\n    ids = tokenizer(text, add_special_tokens=False)["input_ids"]'
        )
    if prompt.name not in _TEXTS:
        return (
            "    from vlmx.models.prompts import choose_prompt\n\n"
            f'    ids = choose_prompt("{prompt.name}", tokenizer).encode_question(question)'
        )
    bos = "[tokenizer.bos_token_id] + " if prompt.visual_at else ""
    return f'    text = {_TEXTS[prompt.name]}\n    ids = {bos}tokenizer(text, add_special_tokens=False)["input_ids"]'


def _lead_code(prompt: ChatPrompt) -> str:
    return f" + {prompt.lead!r}" if prompt.lead else ""


def _rope_text(card: ModelCard) -> str:
    if card.rope == "fp32":
        return ""
    return """ The LLM learned with rotary
positions that are rounded to bfloat16 (rope=bf16); the code below rounds them in the same way."""


def _encoder_text(card: ModelCard) -> str:
    parts = (card.spec,) if isinstance(card.spec, CacheSpec) else card.spec.parts
    lines = []
    for spec in parts:
        g = spec.geometry
        how = (
            f"padded to a square with the colour {g.fill}" if g.mode == "letterbox" and g.height == g.width else g.mode
        )
        lines.append(
            f"Visual tokens come from the frozen encoder {spec.backbone} (weights {spec.weights_sha256}, feature"
            f" {spec.feature}, output norm {spec.out_norm}) on photos of {g.height} x {g.width} pixels ({how},"
            f" {g.resampling}), mean {tuple(spec.mean)}, std {tuple(spec.std)}."
        )
    joined = " The tokens of several encoders are joined on the channel axis, in this order." if len(parts) > 1 else ""
    return "\n".join(lines) + joined
