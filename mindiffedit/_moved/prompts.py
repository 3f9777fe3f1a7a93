from mindiffedit.text.prompts import Captioner, PromptGenerator, average_embeddings

__all__ = ["Captioner", "PromptGenerator", "average_embeddings"]
