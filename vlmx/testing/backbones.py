"""What must every backbone keep? Shapes, determinism, eval mode, dtypes, batch independence, its cache spec.

With pytest:

    suite = BackboneSuite("my-net-imagenet")

    @pytest.mark.parametrize("check", BackboneSuite.CHECKS)
    def test_backbone(check: str) -> None:
        getattr(suite, check)()

Everything runs on the CPU with random weights and small images, except where shapes alone are asked for: that happens
on the meta device, at the backbone's own size, and computes nothing.

Legend: B images, C channels (3), H x W pixels, N tokens, D token width.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vlmx.cache_specs.spec import CacheSpec, DType
from vlmx.errors import UsageError
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.backbones.catalogue import row
from vlmx.extract.plan import spec_of

HALF_PRECISION = {torch.bfloat16: 0.1, torch.float16: 0.02}  # rms error allowed, in standard deviations of the tokens


class BackboneSuite:
    """The checks of one backbone; each raises an AssertionError that says what is not kept.

    Args:
        name: of the catalogue or of a plug-in.
        res: (height, width) of the images that are encoded; None for a small size that the backbone takes.
        options: options of the family.
    """

    CHECKS = (
        "check_the_row_says_what_is_built",
        "check_every_parameter_takes_part",
        "check_shapes",
        "check_determinism",
        "check_eval_mode",
        "check_batch_independence",
        "check_dtypes",
        "check_spec_round_trip",
        "check_sizes_are_refused",
    )

    def __init__(self, name: str, *, res: tuple[int, int] | None = None, **options: Any) -> None:
        self.row = row(name)
        self.res = small_size(name) if res is None else res
        self.options = options

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone in float32 with random weights."""
        return self.build(torch.float32)

    def build(self, dtype: torch.dtype) -> Backbone:
        """Random weights; linear layers and convolutions keep the size of what goes through them.

        Fresh initialisations need not: one that training would tame lets rounding errors grow from layer to layer.
        """
        backbone = build_backbone(self.row.name, res=self.res, weights="random:0", dtype=dtype, **self.options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in backbone.modules():
                if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                    fan_in = module.weight[0].numel()
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
        return backbone

    def images(self, count: int) -> Tensor:
        """(count, 3, H, W), the same ones at every call."""
        return torch.randn(count, 3, *self.res, generator=torch.Generator().manual_seed(5))

    def run(self) -> None:
        """All checks."""
        for check in self.CHECKS:
            getattr(self, check)()

    def check_the_row_says_what_is_built(self) -> None:
        """Grid, width and parameters of the catalogue row are the network's, at the row's own size."""
        built = build_backbone(self.row.name, res=self.row.native_res, device="meta")
        found = {"grid": built.grid, "dim": built.dim, "params": sum(p.numel() for p in built.parameters())}
        stated = {"grid": self.row.grid, "dim": self.row.dim, "params": self.row.params}
        assert found == stated, f"{self.row.name}: the row says {stated}, the network has {found}"

    def check_every_parameter_takes_part(self) -> None:
        """No parameter is built that the tokens do not depend on: nothing after the tap, no head."""
        backbone = build_backbone(self.row.name, res=self.row.native_res, device="meta", **self.options)
        unused = unused_parameters(backbone, torch.empty(1, 3, *self.row.native_res, device="meta"))
        assert not unused, f"{self.row.name}: {len(unused)} parameters are not used, e.g. {unused[:4]}"

    def check_shapes(self) -> None:
        """(B, N, D) finite tokens; N = rows * columns of the grid."""
        tokens_BND = self.backbone(self.images(1))
        rows, columns = self.backbone.grid
        assert tokens_BND.shape == (1, rows * columns, self.backbone.dim), tokens_BND.shape
        assert self.backbone.num_tokens == rows * columns
        assert bool(torch.isfinite(tokens_BND).all()), "tokens are not finite"
        assert float(tokens_BND.std()) > 0, "all tokens are the same"
        assert not tokens_BND.requires_grad, "a frozen encoder must keep no gradients"

    def check_determinism(self) -> None:
        """The same seed gives the same network, whatever the caller's random state; another seed another one."""
        torch.manual_seed(99)
        again = self.build(torch.float32)
        first = self.backbone(self.images(1))
        assert torch.equal(first, self.backbone(self.images(1))), "two passes differ"
        assert torch.equal(first, again(self.images(1))), "two networks of one seed differ"

    def check_eval_mode(self) -> None:
        """Drop path, dropout and batch norm stay in eval mode, also when a caller sets a part to training mode."""
        before = self.backbone(self.images(2))
        state = {key: value.clone() for key, value in self.backbone.state_dict().items()}
        self.backbone.train()
        assert not any(module.training for module in self.backbone.modules()), "train() must not change the mode"
        for module in self.backbone.net.modules():
            module.training = True
        assert torch.equal(self.backbone(self.images(2)), before), "tokens change in training mode"
        after = self.backbone.state_dict()
        changed = [key for key, value in state.items() if not torch.equal(value, after[key])]
        assert not changed, f"a pass changed {changed[:4]}"
        assert not any(p.requires_grad for p in self.backbone.parameters()), "parameters are not frozen"

    def check_batch_independence(self) -> None:
        """The tokens of an image do not depend on the images beside it."""
        together = self.backbone(self.images(3))
        alone = torch.cat([self.backbone(image[None]) for image in self.images(3)])
        error = float((together - alone).abs().max() / together.std())
        assert error < 1e-4, f"an image's tokens differ by {error:.1e} standard deviations with others beside it"

    def check_dtypes(self) -> None:
        """bfloat16 and float16 give tokens of that dtype, close to float32."""
        exact = self.backbone(self.images(1))
        for dtype, allowed in HALF_PRECISION.items():
            rough = self.build(dtype)(self.images(1))
            assert rough.dtype == dtype, f"{dtype} gives {rough.dtype}"
            error = float((rough.float() - exact).pow(2).mean().sqrt() / exact.std())
            assert error < allowed, f"{dtype} is off by {error:.3f} standard deviations"

    def check_spec_round_trip(self) -> None:
        """The cache spec survives JSON, and says of what backbone it is."""
        for dtype in get_args(DType):
            spec = spec_of(self.backbone, dtype)
            again = CacheSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
            assert again == spec, again.differences(spec)
            assert again.fingerprint == spec.fingerprint
            assert spec.backbone == self.row.name

    def check_sizes_are_refused(self) -> None:
        """Sizes that the row excludes are refused with the sizes that it allows."""
        height, width = self.row.native_res
        for res in [(0, 0), (height + 1, width)]:
            allowed = self.row.sizes in ("any", "patch") and min(res) >= self.row.size_step
            try:
                build_backbone(self.row.name, res=res, device="meta")
                refused = False
            except UsageError as error:
                refused = bool(error.fix)
            assert refused != allowed, f"{self.row.name}: {res[0]}x{res[1]}, allowed: {self.row.allowed_sizes}"


def small_size(name: str) -> tuple[int, int]:
    """A small size, higher than wide where it can be, that a backbone takes."""
    wanted = row(name)
    if wanted.sizes == "fixed":
        return wanted.native_res
    step = wanted.size_step
    return (max(3 * step, 48), max(2 * step, 32))


def unused_parameters(module: nn.Module, images_BCHW: Tensor) -> list[str]:
    """Names of the parameters that no operation reads while `module` encodes the images; works on the meta device."""
    read: set[int] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if not func.is_view:
                read.update(id_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
            return func(*args, **kwargs)

    with torch.no_grad(), Record():
        module(images_BCHW)
    return [name for name, parameter in module.named_parameters() if id_of(parameter) not in read]


def id_of(tensor: Tensor) -> int:
    """The same for all views of one storage."""
    return int(tensor.untyped_storage()._cdata)
