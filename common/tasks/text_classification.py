"""Text classification: one label per text."""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from transformers import PreTrainedTokenizerBase

from common.prefix import Inputs


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, max_tokens: int) -> Inputs:
    """(N, T) token ids and attention mask; T is `max_tokens` whatever the texts hold."""
    encoded = tokenizer(
        texts, truncation=True, max_length=max_tokens, padding="max_length", return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def made(tokenizer: PreTrainedTokenizerBase, records: int, *, max_tokens: int) -> Inputs:
    """(N, T) random token ids; every second record is padded from its middle on."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer), (records, max_tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, (max_tokens + 1) // 2 :] = 0
    return {"input_ids": torch.where(mask > 0, ids, tokenizer.pad_token_id), "attention_mask": mask}


def loss_vector(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross entropy of each record: never a mean, which would mix records."""
    return functional.cross_entropy(logits, labels, reduction="none")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) whether each record's likeliest class is its own."""
    return logits.argmax(1) == labels


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and macro-F1, both in [0, 1].

    >>> import torch
    >>> metrics(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1, 1]))
    {'accuracy': 0.6667, 'macro_f1': 0.6667}
    """
    classes, predicted = logits.shape[1], logits.argmax(1)
    accuracy = multiclass_accuracy(predicted, labels, num_classes=classes, average="micro")
    macro = multiclass_f1_score(predicted, labels, num_classes=classes, average="macro")
    return {"accuracy": round(float(accuracy), 4), "macro_f1": round(float(macro), 4)}
