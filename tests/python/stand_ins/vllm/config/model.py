from __future__ import annotations

from dataclasses import dataclass

from vllm.transformers_utils.config import checkpoint_has_lm_head


@dataclass
class ModelConfig:
    model: str
    revision: str | None = None
    tie_word_embeddings: bool = True

    def maybe_untie_word_embeddings(self) -> None:
        if self.tie_word_embeddings and checkpoint_has_lm_head(self.model, revision=self.revision):
            self.tie_word_embeddings = False
