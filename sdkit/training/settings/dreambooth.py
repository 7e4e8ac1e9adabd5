"""Settings of DreamBooth, which those of the U-Net extend."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.files import expanded
from sdkit.training.settings.denoising import DenoisingSettings


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings(DenoisingSettings):
    """Settings of DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242), which teaches a model one object.

    Attributes:
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, a data set's id on the Hub, or a latent cache. Left out if instance_data is given.
        instance_data: Images of one object to learn (DreamBooth), about five, in place of data.
        instance_prompt: Caption of all these images: the object's class with a rare word, such as "a sks dog".
            None reads captions as data does. Neither it nor class_prompt is ever dropped.
        class_data: Images of the object's class, on which the model is to stay as it is. None lets the model
            draw them.
        class_prompt: Caption of all class images, such as "a dog". None trains without them, and the model
            forgets the class.
        class_count: Number of class images. The model draws those that class_data lacks, once, into the run
            folder. None is 100 without class_data, and with it the images that it holds.
        prior_weight: Weight of the class images' loss, beside 1 for the object's.
    """

    data: str | os.PathLike[str] = ""
    instance_data: str | os.PathLike[str] | None = None
    instance_prompt: str | None = None
    class_data: str | os.PathLike[str] | None = None
    class_prompt: str | None = None
    class_count: int | None = None
    prior_weight: float = 1.0

    may_change = DenoisingSettings.may_change | {"instance_data", "class_data"}  # paths; a fingerprint covers both

    def __post_init__(self) -> None:
        if self.instance_data is None and self.data == "":
            raise ArgumentError("data must be given (--data), or instance_data (--instance-data), to train on.")
        super().__post_init__()
        from sdkit.arguments import number, whole_number

        self._keep("prior_weight", number("prior_weight", self.prior_weight, 0))
        if self.class_count is not None:
            self._keep("class_count", whole_number("class_count", self.class_count, 1))
        for name in ("instance_prompt", "class_prompt"):
            self._check_prompt(name)
        self._check_instances()
        self._check_class()

    @property
    def _data_fields(self) -> tuple[str, ...]:
        if self.instance_data is None:
            return ("data",)
        return ("instance_data",) if self.class_data is None else ("instance_data", "class_data")

    def _check_prompt(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, str) or not value.strip():
            raise ArgumentError(f"{name} must be a text of at least one word, not {value!r}.")
        self._keep(name, value.strip())

    def _check_instances(self) -> None:
        """Check the settings of the object's images with each other."""
        if self.instance_data is None:
            for name in ("instance_prompt", "class_data", "class_prompt", "class_count"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name} belongs to DreamBooth; give instance_data, or leave it out.")
        elif self.data != "":
            raise ArgumentError("data and instance_data are two ways to say what to train on; leave one of them out.")
        named = [name for name in ("caption_column", "default_caption") if getattr(self, name)]
        if self.instance_prompt is not None and named:
            raise ArgumentError(f"instance_prompt is the caption of all images; leave {named[0]} out.")

    def _check_class(self) -> None:
        """Check the settings of the class images with each other."""
        if self.class_prompt is None:
            for name in ("class_data", "class_count"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name} needs class_prompt, the caption of the class images; give it, too.")
            if self.prior_weight != 1:
                raise ArgumentError("prior_weight belongs to class images; give class_prompt, or leave it out.")
            return
        if self.prior_weight == 0:
            raise ArgumentError("at prior_weight 0 the class images serve for nothing; leave class_prompt out.")
        if self.class_prompt == self.instance_prompt:
            raise ArgumentError(
                f"instance_prompt and class_prompt are both {self.class_prompt!r}, and the class would become the "
                "object; give instance_prompt a rare word more."
            )
        if self.init is not None:
            raise ArgumentError("a network made from init= knows no class to preserve; leave class_prompt out.")
        if self.class_data is not None and self.instance_data is not None:
            one, other = (expanded(path).resolve() for path in (self.instance_data, self.class_data))
            if one == other:
                raise ArgumentError("instance_data and class_data are the same; name images of the whole class.")
