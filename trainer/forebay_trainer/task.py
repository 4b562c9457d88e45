"""What a recipe's function returns: the modules to train, and what the loop asks about them.

Shape letters: B samples of a micro-batch, T tokens of a sample. A *unit* is what the loss is a mean
of: a sample, or a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from forebay_trainer.metrics.flops import Flops, of_dense
from forebay_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from forebay_trainer.data import Data
    from forebay_trainer.loop import Trainer
    from forebay_trainer.optim import OptimizerConfig

Batch = dict[str, Any]
"""Columns by name, on this rank's device: tensors with B rows, or lists of B values. Besides the
dataset's columns: ``weight``, float32 (B,), 1 for a sample and 0 for padding; ``id``, int64 (B,),
the rows of the dataset version, -1 for padding. Never empty."""


class Task:
    """A recipe subclasses this. One model needs `inputs` and `losses`; all else has a default.

    The loop's loss is Σ weights · losses / Σ weights over all micro-batches of all ranks, so it is
    the same for every number of them.
    """

    own_step: ClassVar[bool] = False
    """Whether the loop calls `step` instead of its own forward and backward."""

    def __init__(self, model: nn.Module | Mapping[str, nn.Module]) -> None:
        """*model*: the module to train, or several by the names that their weights are saved
        under."""
        self.modules = {"model": model} if isinstance(model, nn.Module) else dict(model)

    # The loss.

    def prepare(self, batch: Batch) -> Batch:
        """A loader's batch as `inputs` and `losses` want it: normalised, say."""
        return batch

    def augment(self, batch: Batch, seed: int, step: int) -> Batch:
        """A prepared batch as training sees it in one step: masked, say, or moved about. Not called
        for evaluations. What is drawn by `dropout.uniform((seed, step), batch["id"], …)` is the
        same on other ranks and after every resume; draws of torch's generators are not."""
        return batch

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The arguments of the model's forward."""
        raise NotImplementedError

    def keywords(self, batch: Batch) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward, with B rows: masks, say. Every stage of a
        pipeline gets them, while only the first one gets `inputs`."""
        return {}

    def forward(self, modules: Mapping[str, nn.Module], batch: Batch) -> Any:
        """What `losses` and `evaluate` get. Override it where there are several modules; with
        one, override `inputs`, which pipelines need too."""
        (model,) = modules.values()
        return model(*self.inputs(batch), **self.keywords(batch))

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each unit: (B,), or (B, T)."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> Tensor:
        """What each of `losses` weighs: 0 for what does not count, as padding."""
        weight_B: Tensor = batch["weight"]
        return weight_B

    # Evaluation.

    def evaluate(self, outputs: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the batch that `metrics` needs, each of any shape (hits, or a count for each
        class); padding must add nothing."""
        return {}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Figures from the sums over the whole test data: floats, and float64 tensors of what has
        a shape; ``sums["weight"]`` counts its units."""
        return {}

    # The optimizers.

    def optimizers(
        self, modules: Mapping[str, nn.Module], config: OptimizerConfig
    ) -> dict[str, Optimizer]:
        """One optimizer for each module that learns, by its name. *modules* are as they lie on
        the mesh: parameters of before are no longer the ones that are trained."""
        return {
            name: config.build([each for each in module.parameters() if each.requires_grad])
            for name, module in modules.items()
        }

    # Figures.

    def num_tokens(self, batch: Batch) -> int:
        """Tokens in the batch, for tokens/s; 0 where there is no such thing."""
        return 0

    def flops(self) -> Flops:
        """Floating-point operations of forward and backward as a function of (samples, tokens),
        for the utilisation. Called once, before the modules are laid out on the mesh. The default
        is right for dense layers alone; elsewhere override it, as by `metrics.flops.counted`."""
        return of_dense(self.modules)

    # How the model can be cut. Nothing of this is needed for one process, or for DDP.

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """What FSDP2 gathers at a time, innermost first: by default the items of module lists."""
        lists = (each for each in model.modules() if isinstance(each, nn.ModuleList))
        return [block for each in lists for block in each]

    def tensor_plan(self, model: nn.Module) -> Mapping[str, ParallelStyle]:
        """Module names to how tensor parallelism cuts them (``parallelize_module``)."""
        raise InvalidRequest(
            f"parallel.num_tensor: {type(self).__name__} has no tensor_plan(), so its model cannot "
            "be cut; use parallel.num_shards"
        )

    def split(self, model: nn.Module, stage: int, num_stages: int) -> nn.Module:
        """The part of the model that is pipeline stage *stage*, its weights named as before."""
        raise InvalidRequest(
            f"parallel.num_stages: {type(self).__name__} has no split(), so its model cannot run "
            "as a pipeline; use parallel.num_shards"
        )

    # For what is not one forward and one backward.

    def step(self, trainer: Trainer, parts: Iterable[Batch], total: float) -> dict[str, float]:
        """With `own_step`: computes gradients and updates (`Trainer.backward`, `Trainer.update`).

        *total* is the sum of `weights` over all parts of all ranks. Returns this rank's share of
        the values to log, ``loss`` among them: they are added up over the ranks. Where the run may
        be deterministic, ``trainer.draws.at(trainer.step, part["id"])`` before a forward that drops
        out; `forward`, `losses` and `evaluate` are called for evaluations as ever.
        """
        raise NotImplementedError

    def before_epoch(self, epoch: int, data: Data) -> None:
        """Called on all ranks before an epoch: the place to append to the dataset (`Data.append`,
        by one rank, or `Data.renew`), with ``data.follow``. Once more for an epoch that an attempt
        goes on in: that epoch stays on the version that it began with."""


def layers_of_stage(num_layers: int, stage: int, num_stages: int) -> range:
    """The consecutive layers of a stage, as even as can be."""
    return range(num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages)


def keep_only(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The model with identities in place of its submodules that lie outside *names*: what is left
    keeps its name, and the forward passes through what is not. For `Task.split` of a model whose
    parts follow one another."""
    kept = [name.split(".") for name in names]

    def is_kept(path: list[str]) -> bool:
        return any(path[: len(one)] == one for one in kept)

    def leads_to_kept(path: list[str]) -> bool:
        return any(one[: len(path)] == path for one in kept)

    def prune(module: nn.Module, path: list[str]) -> None:
        for name, child in list(module.named_children()):
            below = [*path, name]
            if is_kept(below):
                continue
            if leads_to_kept(below) or isinstance(child, nn.ModuleList):
                prune(child, below)
            else:
                setattr(module, name, nn.Identity())

    prune(model, [])
    return model


def share_of_mean(losses: Tensor, weights: Tensor, total: float) -> Tensor:
    """What these units add to the mean loss of a global batch whose weights add up to *total*.

    Padding weighs 0 and every real unit the same, however many its rank has: the sum over the
    ranks is the mean that one process would compute, for any number of ranks.
    """
    return (losses * weights).sum() / max(1.0, total)
