"""Muon: momentum whose updates are orthogonalised, for the matrices of a network's layers.

    optimizer = Muon([{"params": weights, "rows": (C, C)}], lr=0.02)

Keller Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/. The update is that of
torch.optim.Muon with other coefficients; it takes less time, since equal matrices go through
Newton-Schulz as one batch, in fewer steps, and on a CPU in float32. Embeddings, norms and biases
are not for it: `configure_optimizers` leaves them to AdamW. This file needs torch alone.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# a, b, c of each step: the three steps that bring all singular values from 0.005 to 1 closest to 1,
# between 0.5 and 1.5 (computed as in Polar Express, arXiv:2505.16932). That paper's margin of 1.01
# keeps rounding errors in bfloat16 from growing.
POLAR_EXPRESS = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
)
COEFFICIENTS = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS)


def orthogonalize(X: Tensor) -> Tensor:
    """X (N, r, c) with its singular values brought near 1, most to 0.5 to 1.5: U S V^T to U V^T.

    A Newton-Schulz step takes X to a X + b (X X^T) X + c (X X^T)^2 X, which acts on the singular
    values alone. For a wide X the steps are computed from X X^T, and X is multiplied once, at the
    end; not in bfloat16, where X X^T loses the small singular values and the steps blow them up.
    """
    if X.size(-2) > X.size(-1):
        return orthogonalize(X.mT).mT
    X = X / (1.01 * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if X.size(-1) < 2 * X.size(-2) or X.dtype == torch.bfloat16:
        for a, b, c in COEFFICIENTS:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        return X
    A, step, steps = X @ X.mT, None, None
    for a, b, c in COEFFICIENTS:
        if step is not None:
            A = step @ A @ step
        step = torch.baddbmm(A, A, A, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        steps = step if steps is None else step @ steps
    return steps @ X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. A group's `rows` are the rows of the matrices that are
    stacked in each of its weights, such as (C, C) for keys and values.

    `lr` is how far a step moves a weight of r rows and c columns, as a spectral norm, over
    sqrt(max(1, r / c)). `weight_decay` is decoupled: a step takes lr * weight_decay of the weight.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"Muon's momentum={momentum}: must be at least 0 and less than 1")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """Moves all weights that have a gradient."""
        batches = defaultdict(list)  # matrices and their updates, by shape and learning rate
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(weights, updates, strict=True):
                moved, rows = p, group["rows"]
                if is_sharded(p):  # whole for this step, one weight at a time
                    update = update.full_tensor()
                    moved = torch.zeros_like(update)
                for part in zip(moved.split(rows), update.split(rows), strict=True):
                    batches[part[0].shape, group["lr"]].append(part)
                if moved is not p:
                    self._move(batches)
                    p.add_(share_of(p, moved))
        self._move(batches)

    def _move(self, batches: dict[tuple[torch.Size, float], list[tuple[Tensor, Tensor]]]) -> None:
        """Moves the matrices by their updates, orthogonalised, and forgets them."""
        for ((rows, columns), lr), parts in batches.items():
            weights, updates = zip(*parts, strict=True)
            X = torch.stack(updates)
            bfloat16 = X.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            X = orthogonalize(X.bfloat16() if bfloat16 else X).to(X.dtype)
            torch._foreach_add_(weights, X.unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)
        batches.clear()


def is_sharded(p: Any) -> bool:
    """Whether p is a DTensor, as `fully_shard` makes them; the class takes a second to import."""
    return hasattr(p, "full_tensor")


def share_of(p: Tensor, whole: Tensor) -> Tensor:
    """`whole` (the same in all processes), sharded like p; unchanged where p is not sharded."""
    if not is_sharded(p) or whole.shape != p.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(p.device)
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def gather(state: Any, keep: bool) -> Any:
    """A state_dict, or a list of them, with sharded tensors gathered on the CPU; they are None in a
    process that does not `keep` them."""
    if isinstance(state, dict):
        return {name: gather(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep) for value in state]
    if not is_sharded(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if keep else None


def grad_norm(params: Iterable[Tensor]) -> Tensor:
    """The norm of the whole gradient, over all processes that share it; a 0-dim tensor."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm.full_tensor() if is_sharded(norm) else norm


def configure_optimizers(
    model: nn.Module, adamw: dict[str, Any], muon: dict[str, Any] | None
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters of the model; or Muon for the weights of its nn.Linear modules, and
    AdamW for the rest. The weight of a Linear with `sizes` stacks matrices of so many rows.

    `adamw` and `muon` are their arguments; with muon=None, AdamW trains all. Its weight decay acts
    on parameters of two dimensions and more.
    """
    matrices = defaultdict(list)  # weights, by the rows of the matrices that each of them stacks
    for module in model.modules() if muon is not None else ():
        if isinstance(module, nn.Linear):
            rows = getattr(module, "sizes", (module.out_features,))
            matrices[rows].append(module.weight)
    by_muon = {id(p) for weights in matrices.values() for p in weights}
    rest = [p for p in model.parameters() if id(p) not in by_muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2]},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, fused=True, **adamw)]
    if muon is not None:
        groups = [{"params": weights, "rows": rows} for rows, weights in matrices.items()]
        optimizers.append(Muon(groups, **muon))
    return optimizers


def restore(optimizers: list[torch.optim.Optimizer], saved: list[dict[str, Any]]) -> None:
    """Loads the saved states, made by `state_dict`, into these optimizers; their groups, with the
    learning rates, stay as they are. ValueError where a state does not fit the parameters."""
    try:
        for opt, state in zip(optimizers, (dict(one)["state"] for one in saved), strict=True):
            params = [p for group in opt.param_groups for p in group["params"]]
            names = ("step", "exp_avg", "exp_avg_sq")
            if isinstance(opt, Muon):
                names = ("momentum_buffer",)
            for k, of_p in state.items():
                shapes = {n: torch.Size() if n == "step" else params[k].shape for n in names}
                if {name: value.shape for name, value in of_p.items()} != shapes:
                    raise ValueError(f"that of parameter {k} has other names or shapes")
                state[k] = {name: share_of(params[k], value) for name, value in of_p.items()}
            opt.load_state_dict(opt.state_dict() | {"state": state})
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"the optimizers' state does not fit: {error}") from None
