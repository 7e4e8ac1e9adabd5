"""`Metric`: a metric of pictures, as a run's settings name it."""

from __future__ import annotations

from typing import NamedTuple

from sdkit.errors import ArgumentError

METRICS = ("lpips", "frechet", "kid", "clip_score")  # of pictures, at validation


class Metric(NamedTuple):
    """A metric of pictures, as `evaluate` names it.

    Attributes:
        name: "lpips", "frechet", "kid", or "clip_score".
        extractor: Feature extractor, as `sdkit.evaluation.open_extractor` takes it; empty for "lpips".
        key: Name of the metric in metrics.jsonl.
    """

    name: str
    extractor: str
    key: str

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Read "METRIC" or "METRIC:EXTRACTOR", such as "kid:dinov2:facebook/dinov2-base"; for "clip_score", a CLIP.

        Raises:
            ArgumentError: There is no such metric or extractor.
        """
        from sdkit.arguments import one_of
        from sdkit.evaluation.extractors import NAMES

        name, _, extractor = text.partition(":")
        one_of("evaluate", name, METRICS)
        if name == "lpips":
            if extractor:
                raise ArgumentError(f"evaluate {text!r}: lpips takes no extractor; leave it out.")
            return cls(name, "", name)
        if name == "clip_score":
            return cls(name, f"clip:{extractor}" if extractor else "clip", name)
        kind = extractor.partition(":")[0]
        if extractor:
            one_of(f"evaluate {name}: the extractor", kind, NAMES)
        return cls(name, extractor or "alex", f"{name}_{kind}" if extractor else name)
