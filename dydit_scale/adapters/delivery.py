"""How the timestep embedding reaches the TD-LoRA layers of a model, also while activations are recomputed."""

from __future__ import annotations

from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from dydit_scale.dynamic.timestep import TimestepState

EMBEDDER_NAMES = ("timestep_embedder", "t_embedder")


class HookedTimestepState(TimestepState):
    """State of a static model: hooks fill it during the model's forward and empty it afterwards.

    An embedder called outside the model's forward leaves no trace, and a forward that never reaches the embedder
    leaves the state empty, so that a layer raises instead of using the embedding of an earlier call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running = False

    def start(self) -> None:
        """Begin a forward of the root model."""
        self._running, self._emb = True, None

    def store(self, emb: Tensor) -> None:
        """Keep ``emb`` [batch, dim] as fp32 until the forward ends."""
        if self._running:
            self._emb = emb.float()

    def stop(self) -> None:
        """End the forward."""
        self._running, self._emb = False, None


# Module-level functions that find the state on the module: a closure over the state would survive a deepcopy of the
# model and write into the state of the original.
def _start(model: nn.Module, args: Any) -> None:
    model.timestep_state.start()  # type: ignore[operator, union-attr]


def _store(embedder: nn.Module, args: Any, output: Tensor) -> None:
    embedder.td_timestep_state.store(output)  # type: ignore[operator, union-attr]


def _stop(model: nn.Module, args: Any, output: Any) -> None:
    model.timestep_state.stop()  # type: ignore[operator, union-attr]


def is_in_embedder(name: str) -> bool:
    """Whether the module called ``name`` is the timestep embedder or a part of it."""
    return any(part in EMBEDDER_NAMES for part in name.split("."))


def _embedders(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in EMBEDDER_NAMES}


def only_embedder(model: nn.Module) -> tuple[str, nn.Module]:
    """The timestep embedder of a static model, with its name. Raises ValueError if there is none, or several."""
    embedders = _embedders(model)
    if len(embedders) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected one module called {' or '.join(EMBEDDER_NAMES)}, found "
            f"{sorted(embedders) or 'none'}; give the model a `timestep_state` whose scope its blocks open"
        )
    ((name, embedder),) = embedders.items()
    return name, embedder


def attach_timestep_state(model: nn.Module) -> TimestepState:
    """The state that delivers the embedding inside ``model``: its own, or one that hooks keep (static models).

    A dynamic model owns ``timestep_state`` and opens its scope in its blocks. A static model (for example diffusers'
    FluxTransformer2DModel) gets the attribute, a hook on its timestep embedder and two on its root; it then serves
    one forward at a time, and only calls of the root module itself are seen.

    Raises ValueError if a static model does not have exactly one timestep embedder.
    """
    state = getattr(model, "timestep_state", None)
    if isinstance(state, TimestepState):
        return state
    if state is not None:
        raise ValueError(f"{type(model).__name__}.timestep_state: expected a TimestepState, got {type(state).__name__}")
    _, embedder = only_embedder(model)
    hooked = HookedTimestepState()
    model.timestep_state = hooked  # type: ignore[assignment]
    embedder.td_timestep_state = hooked  # type: ignore[assignment]
    model.register_forward_pre_hook(_start)
    embedder.register_forward_hook(_store)
    model.register_forward_hook(_stop, always_call=True)
    return hooked


def embedding_dim(model: nn.Module, given: int | None) -> int:
    """Width of the timestep embedding: that of the embedder's last linear layer, or ``given`` where it has none.

    Raises ValueError if both are known and differ, or if neither is known.
    """
    embedders = list(_embedders(model).values())
    linears = [m for m in embedders[0].modules() if isinstance(m, nn.Linear)] if len(embedders) == 1 else []
    found = linears[-1].out_features if linears else None
    if given is None and found is None:
        raise ValueError(f"{type(model).__name__}: no timestep embedder found, so set `time_dim` in the TD-LoRA config")
    if given is not None and found is not None and given != found:
        raise ValueError(f"{type(model).__name__}: timestep embedding has {found} values, the config says {given}")
    return found if given is None else given  # type: ignore[return-value]


class TimestepCheckpoint:
    """A gradient checkpointing function that carries the timestep embedding as an explicit input of each call.

    Without it a block that is recomputed in the backward pass of a static model finds no embedding and raises.
    """

    def __init__(self, state: TimestepState, **options: Any) -> None:
        if options.get("use_reentrant", False):
            raise ValueError("checkpoint_with_timestep: reentrant checkpointing loses adapter gradients; leave it off")
        self.state = state
        self.options = {**options, "use_reentrant": False}

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Run ``module(*args)``; its activations are recomputed in the backward pass."""
        return torch.utils.checkpoint.checkpoint(self._run, self.state.emb, module, *args, **self.options)

    def _run(self, emb: Tensor | None, module: nn.Module, *args: Any) -> Any:
        with self.state.scope(emb):
            return module(*args)


def checkpoint_with_timestep(model: nn.Module, **options: Any) -> TimestepCheckpoint:
    """The function for ``model.enable_gradient_checkpointing(gradient_checkpointing_func=...)`` of a static model.

    ``options`` go to torch.utils.checkpoint.checkpoint. Dynamic models do not need it: their blocks open the scope
    themselves, so any non-reentrant checkpointing is right. Right for several forwards before one backward, too.
    """
    return TimestepCheckpoint(attach_timestep_state(model), **options)
