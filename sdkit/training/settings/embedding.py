"""Settings of `train_embedding`."""

from __future__ import annotations

from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.training.settings.denoising import DenoisingSettings

TEMPLATES = ("object", "style")  # names in sdkit.training.stages.embedding.TEMPLATES


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(DenoisingSettings):
    """Settings of `train_embedding`. All networks are frozen; `data` may also be a latent cache.

    Attributes:
        token: New token to learn, which no word of the vocabulary is, such as "<zork>". Prompts name it so.
        init_token: Word of the vocabulary from whose vector learning starts, such as "cat".
        vectors: Vectors of the token. More vectors show more detail, and take more of a prompt's 75 tokens.
        template: Captions of images whose own caption does not name the token: photos of an object, or
            paintings in a style (Gal et al. 2022).
        keep_norm: Scale the vectors to the mean length of the vocabulary's after each step, so that the other
            words of a prompt keep their weight.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        ema_decay: Decay of the moving average of the vectors, which is validated and exported; 0 turns it off.
        caption_dropout: Share of samples trained with an empty caption, from which a token learns nothing.
    """

    token: str
    init_token: str
    vectors: int = 1
    template: str = "object"
    keep_norm: bool = False
    learning_rate: float = 5e-3
    ema_decay: float = 0.0
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, one_of, whole_number
        from sdkit.loading.embedding_file import check_token

        check_token(self.token)
        if not isinstance(self.init_token, str) or not self.init_token:
            raise ArgumentError(f"init_token must be a word, not {self.init_token!r}.")
        self._keep("vectors", whole_number("vectors", self.vectors, 1))
        one_of("template", self.template, TEMPLATES)
        flag("keep_norm", self.keep_norm)
        if self.init is not None:
            raise ArgumentError("init has no meaning for an embedding, which is learned for a model; leave it out.")
