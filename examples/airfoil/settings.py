"""All that decides what is learned and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment; a checkpoint is only resumed under the same ones.

    Attributes:
        epochs: Times that every section is seen.
        sections: Sections to train on.
        batch_size: Sections of a step.
        learning_rate: Its largest value.
        surface_points: Points in memory on each section.
        volume_points: Points in memory around each section.
        surface_anchors, surface_queries, volume_anchors, volume_queries: Sizes of the groups in training. Evaluation
            takes as many anchors, and as many queries as one likes.
        seed: Fixes the sections, the initial weights and the batches.

    Raises:
        ValueError: If there are fewer sections than a step takes.
    """

    epochs: int = 18
    sections: int = 512
    batch_size: int = 6
    learning_rate: float = 4e-3
    surface_points: int = 320
    volume_points: int = 1024
    surface_anchors: int = 128
    surface_queries: int = 64
    volume_anchors: int = 128
    volume_queries: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sections < self.batch_size:
            raise ValueError(f"sections: expected at least {self.batch_size}, those of one step, got {self.sections}")
