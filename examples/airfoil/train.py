"""Training, with a checkpoint after every epoch from which an interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from examples.airfoil.data import Batch, Flows, epoch_of_batches
from examples.airfoil.model import AirfoilSurrogate, branch_of
from examples.airfoil.ranks import Ranks
from examples.airfoil.settings import Settings


class Training:
    """A model and all else that its next step depends on.

    Args:
        settings: What to do.
        device: Where the model is.
        ranks: The processes that share the tokens; by default this one alone.

    Attributes:
        model: The surrogate, with seeded initial weights.
        epoch: How many epochs are done.
        losses: Those of every step that is done; after older checkpoints, which have none, of those since.
    """

    def __init__(self, settings: Settings, device: torch.device, ranks: Ranks | None = None) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.ranks = Ranks() if ranks is None else ranks
        self.model = AirfoilSurrogate().to(device)
        self.trained = self.ranks.spread(self.model)
        self.optimizers = make_optimizers(self.model)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.losses: list[float] = []

    def run(self, flows: Flows, checkpoint: Path) -> None:
        """Trains on flows, on the device of the model, until all epochs are done; saves after each."""
        steps_per_epoch = len(flows) // self.settings.batch_size
        steps = self.settings.epochs * steps_per_epoch
        hidden = not self.ranks.is_first
        done = self.epoch * steps_per_epoch
        with tqdm(total=steps, initial=done, unit="step", desc="training", disable=hidden) as bar:
            while self.epoch < self.settings.epochs:
                done = self.epoch * steps_per_epoch
                for index, batch in enumerate(epoch_of_batches(flows, self.settings, self.generator)):
                    loss = self.step(batch, (done + index) / steps)
                    self.losses.append(loss)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    bar.update()
                self.epoch += 1
                self.save(checkpoint)

    def step(self, batch: Batch, progress: float) -> float:
        """Takes one step down the sum of both branches' squared relative errors, and returns that.

        The learning rate rises for a twentieth of the steps and then falls like a cosine; ``progress`` is in [0, 1].
        """
        predicted = self.trained(self.ranks.share(batch.groups), batch.stream)
        errors = []
        for branch, target in batch.targets.items():
            specs = self.ranks.specs({name: t for name, t in batch.groups.items() if branch_of(name) == branch})
            # Every process has the loss of all tokens, so that their gradients add up to so many times its own, of
            # which the mean is taken.
            errors.append(relative_error(self.ranks.whole(predicted[branch], specs), target))
        loss = torch.stack(errors).square().sum()
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = min(20 * progress + 0.01, (1 + math.cos(math.pi * progress)) / 2)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * self.settings.learning_rate
            optimizer.step()
        return loss.item()

    def save(self, path: Path) -> None:
        """Writes a checkpoint. Whenever this is interrupted the file is whole: the old one or the new one."""
        if not self.ranks.is_first:
            return
        state = {
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            ValueError: If it comes from other settings.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        differing = dict(state["settings"].items() - asdict(self.settings).items())
        if differing:
            raise ValueError(f"{path} was trained with {differing}; train as it was, or start anew with --restart")
        self.model.load_state_dict(state["model"])
        for optimizer, its_state in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(its_state)
        self.generator.set_state(state["generator"])
        self.epoch, self.losses = state["epoch"], state.get("losses", [])


def make_optimizers(model: AirfoilSurrogate) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for all else.

    NOTE: AdamW alone needs more than twice the steps: after 2000, its errors on held-out sections are twice as large.
    """
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    taken = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return (
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95)),
    )


def relative_error(predicted: Tensor, target: Tensor) -> Tensor:
    """The L2 norm of the error over that of the target."""
    return (predicted - target).norm() / target.norm()
