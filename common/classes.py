"""What all tasks with classes share: loss, score and metrics of one label per record."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from common.config import Config, HeadName, ModelConfig
from common.errors import ConfigError, first_line
from common.model import Classifier, FineTuned, NativeClassifier, read_of
from common.prefix import Inputs
from common.pretrained import load_encoder
from common.records import Records
from common.tuning import tune

HEAD_WEIGHT, HEAD_BIAS = "mean_pooled_head.weight", "mean_pooled_head.bias"
"""Names that no head of transformers has: it would take them for its own, over another pooling."""
WEIGHTS = "model.safetensors"
COTERIE_KEY = "coterie"
"""Entry of a released `config.json` that says how the head reads the encoder."""
LABELS, PREDICTED = "target_labels", "predicted"


class ClassTask:
    """A task whose records each carry one of `data.labels`."""

    CLASSES = True
    LOWER_IS_BETTER = False
    FAMILY: ClassVar[Any]
    """The Auto class of transformers that opens a model with the native head."""

    def loss_vector(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) cross entropy of each record: never a mean, which would mix records."""
        return functional.cross_entropy(output, targets[LABELS], reduction="none")

    def correct(self, output: Tensor, targets: Inputs) -> Tensor:
        """(B,) whether each record's likeliest class is its own."""
        return output.argmax(1) == targets[LABELS]

    def score(self, model: FineTuned, inputs: Inputs) -> Inputs:
        """(B,) likeliest class and true one."""
        output: Tensor = model(**read_of(inputs))
        return {PREDICTED: output.argmax(1), LABELS: inputs[LABELS]}

    def metrics(
        self, scores: Inputs, _records: Records, _processor: Any, config: Config
    ) -> dict[str, float]:
        """Accuracy and macro-F1, both in [0, 1]."""
        from torchmetrics.functional.classification import (  # noqa: PLC0415 - after training only
            multiclass_accuracy,
            multiclass_f1_score,
        )

        classes, predicted, labels = len(config.data.labels), scores[PREDICTED], scores[LABELS]
        accuracy = multiclass_accuracy(predicted, labels, num_classes=classes, average="micro")
        macro = multiclass_f1_score(predicted, labels, num_classes=classes, average="macro")
        return {"accuracy": round(float(accuracy), 4), "macro_f1": round(float(macro), 4)}

    def detail(self, scores: Inputs, config: Config) -> dict[str, Any]:
        """Precision, recall, F1 and number of records of each class, and the confusion matrix: a
        row a true class, a column a predicted one. What would divide by nothing is 0.
        """
        from torchmetrics.functional.classification import (  # noqa: PLC0415 - the same
            multiclass_confusion_matrix,
            multiclass_f1_score,
            multiclass_precision,
            multiclass_recall,
        )

        names, predicted, labels = config.data.labels, scores[PREDICTED], scores[LABELS]
        by_class = {
            "precision": multiclass_precision,
            "recall": multiclass_recall,
            "f1": multiclass_f1_score,
        }
        measures = {
            name: measure(predicted, labels, num_classes=len(names), average="none").tolist()
            for name, measure in by_class.items()
        }
        counts = multiclass_confusion_matrix(predicted, labels, num_classes=len(names))
        rows = [
            {
                "class": label,
                **{name: round(values[at], 4) for name, values in measures.items()},
                "support": int(counts[at].sum()),
            }
            for at, label in enumerate(names)
        ]
        return {"classes": rows, "confusion": counts.tolist()}

    def save(self, model: FineTuned, folder: Path, facts: dict[str, Any]) -> None:
        """Writes encoder, with its adapters merged, and head: `AutoModel` opens the folder, and
        `pipeline(...)` that of a native head.
        """
        if isinstance(model, NativeClassifier):
            native = model.merged_native()
            setattr(native.config, COTERIE_KEY, {"head": HeadName.native.name, **facts})
            native.save_pretrained(folder)
            return
        assert isinstance(model, Classifier)
        encoder = model.merged_encoder()
        name_labels(encoder, model.labels)
        setattr(encoder.config, COTERIE_KEY, {"pooling": "mean", **facts})
        prefix = encoder.base_model_prefix
        weights = {f"{prefix}.{name}": t.contiguous() for name, t in encoder.state_dict().items()}
        weights[HEAD_WEIGHT] = model.classifier.weight.detach().contiguous()
        weights[HEAD_BIAS] = model.classifier.bias.detach().contiguous()
        encoder.config.save_pretrained(folder)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    def restore(self, folder: Path, settings: dict[str, Any]) -> FineTuned:
        """Opens what `save` wrote. Raises: KeyError, ValueError or ConfigError."""
        labels = [settings["id2label"][str(i)] for i in range(len(settings["id2label"]))]
        if settings[COTERIE_KEY].get("head") == HeadName.native.name:
            native = load_encoder(ModelConfig(str(folder.resolve())), self.FAMILY)
            return NativeClassifier(native, labels=labels)
        scale = float(settings[COTERIE_KEY]["feature_scale"])
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weight, bias = file.get_tensor(HEAD_WEIGHT), file.get_tensor(HEAD_BIAS)
        encoder = load_encoder(ModelConfig(str(folder.resolve()), scale))
        model = Classifier(encoder, labels=labels, feature_scale=scale)
        if (
            weight.shape != model.classifier.weight.shape
            or bias.shape != model.classifier.bias.shape
        ):
            raise ConfigError(f"{folder}: its head does not fit its encoder")
        with torch.no_grad():
            model.classifier.weight.copy_(weight)
            model.classifier.bias.copy_(bias)
        return model


def build_classifier(config: Config, probe: Inputs, family: Any) -> FineTuned:
    """Encoder with the head that `model.head` names, tuned as the config says.

    Args: probe: two made records of full size, as the model reads them; family: the Auto class of
    the native head.
    Raises: ConfigError if the model is not one, cannot read them, or has nothing to tune.
    """
    if config.model.head is HeadName.native:
        native = load_native(config, family)
        return tune(NativeClassifier(native, labels=list(config.data.labels)), config, probe)
    encoder = load_encoder(config.model)
    if not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise ConfigError(
            f"model.name={config.model.name}: {type(encoder).__name__} has no hidden size; "
            "choose a Transformer encoder"
        )
    scale = config.model.feature_scale
    model = Classifier(encoder, labels=list(config.data.labels), feature_scale=scale)
    return tune(model, config, probe)


def load_native(config: Config, family: Any) -> PreTrainedModel:
    """The encoder under its native head.

    Guarantee: what the model's files do not hold depends on `config.seed` and nothing else; the
    output layer is zero. Raises: ConfigError if transformers has no such head for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = load_encoder(config.model)
        name_labels(encoder, config.data.labels)
        try:
            native: PreTrainedModel = family.from_config(encoder.config)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"model.head=native: {type(encoder).__name__} has none in transformers for "
                f"task={config.task.name.name} ({first_line(error)}); leave it out"
            ) from error
    # Poolers that only one of the two has are left: the head that reads one trains it.
    missing, _ = native.base_model.load_state_dict(encoder.state_dict(), strict=False)
    assert all(name.startswith("pooler.") for name in missing), missing
    _zero_output(native, len(config.data.labels))
    return native


def name_labels(model: PreTrainedModel, labels: list[str]) -> None:
    """Writes the class names into the model's own config."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


@torch.no_grad()
def _zero_output(native: PreTrainedModel, classes: int) -> None:
    """Zeros the last linear layer: before training each class is as likely as another.

    Raises: ConfigError if there is none.
    """
    below = {*native.base_model.modules()}
    head = [m for m in native.modules() if isinstance(m, nn.Linear) and m not in below]
    if not head or head[-1].out_features != classes:
        raise ConfigError(
            f"model.head=native: {type(native).__name__} ends in no linear layer; leave it out"
        )
    for parameter in head[-1].parameters():
        parameter.zero_()


def class_targets(records: Records) -> Inputs:
    """(N,) class index of each record."""
    return {LABELS: torch.from_numpy(records.labels)}


def likeliest(
    model: FineTuned, logits: Tensor, asked: list[str], kind: str = "text"
) -> list[dict[str, Any]]:
    """Label and probability of each, and a sentence that says so; `kind` is what was asked."""
    assert isinstance(model, Classifier | NativeClassifier)
    best = logits.softmax(1).max(1)
    found = zip(asked, best.values.tolist(), best.indices.tolist(), strict=True)
    return [
        {
            kind: text,
            "label": model.labels[index],
            "probability": round(value, 4),
            "sentence": f"{model.labels[index]} ({value:.0%}): {text}",
        }
        for text, value, index in found
    ]
