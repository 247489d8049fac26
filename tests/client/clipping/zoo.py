"""Tiny models with random weights, and losses of made records: what the contract suite runs on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import peft
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

WORDS, TOKENS, LABELS, SIDE, SAMPLES = 61, 10, 3, 16, 400
DECODED = 5
STIR = 0.05


@dataclass(frozen=True)
class Specimen:
    """A model and the losses of any number of made records."""

    model: nn.Module
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    head: tuple[str, ...] = ("classifier", "score", "head")
    """What the names of the head's parameters begin with."""

    def made(self, records: int) -> Callable[[np.ndarray], Tensor]:
        """Losses of made records by index, in the model's dtype: the same on every call."""
        inputs = self.inputs(records, torch.Generator().manual_seed(records))

        def loss_of(piece: np.ndarray) -> Tensor:
            dtype = next(self.model.parameters()).dtype
            chosen = {
                name: value[piece].to(dtype) if value.is_floating_point() else value[piece]
                for name, value in inputs.items()
            }
            return self.loss(self.model, chosen)

        return loss_of


def classified(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Cross entropy of each record's label."""
    labels = inputs.pop("label")
    output = model(**inputs)
    return functional.cross_entropy(getattr(output, "logits", output), labels, reduction="none")


def continued(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the next tokens, summed over a record's own."""
    del inputs["label"]
    logits, ids = model(**inputs).logits[:, :-1], inputs["input_ids"][:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (losses * inputs["attention_mask"][:, 1:]).sum(1) / TOKENS


def translated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the decoder's next tokens."""
    logits, ids = model(**inputs).logits[:, :-1], inputs["decoder_input_ids"][:, 1:]
    return functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)


def pooled(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A smooth loss of every feature, for models without a head."""
    inputs.pop("label", None)
    output = model(**inputs)
    features = getattr(output, "pooler_output", None)
    features = getattr(output, "last_hidden_state", output) if features is None else features
    return features.flatten(1).square().sum(1).add(1).log()


def texts(records: int, generator: torch.Generator, *, padding: int = 0) -> dict[str, Tensor]:
    """Token ids of unequal lengths, repetitions included."""
    ids = torch.randint(5, WORDS, (records, TOKENS), generator=generator)
    ids[:, 3] = ids[:, 1]
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (records,), generator=generator)
    lengths[0] = TOKENS
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    label = torch.randint(LABELS, (records,), generator=generator)
    return {"input_ids": ids.where(mask > 0, padding), "attention_mask": mask, "label": label}


def pairs(records: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A text and its translation."""
    given = texts(records, generator)
    del given["label"]
    given["decoder_input_ids"] = torch.randint(5, WORDS, (records, DECODED), generator=generator)
    return given


def floats(
    records: int, generator: torch.Generator, *, shape: tuple[int, ...], name: str
) -> dict[str, Tensor]:
    """Images, sounds, vectors."""
    values = torch.randn(records, *shape, generator=generator)
    label = torch.randint(LABELS, (records,), generator=generator)
    return {name: values, "label": label}


IMAGES = partial(floats, shape=(3, SIDE, SIDE), name="pixel_values")
SOUNDS = partial(floats, shape=(SAMPLES,), name="input_values")

Make = Callable[[], Specimen]


def text(kind: str, *, padding: int = 0, **config: Any) -> Make:
    """A classifier of texts."""

    def make() -> Specimen:
        made = getattr(hf, f"{kind}Config")(num_labels=LABELS, pad_token_id=padding, **config)
        model = getattr(hf, f"{kind}ForSequenceClassification")(made)
        return Specimen(model, partial(texts, padding=padding), classified)

    return make


def causal(kind: str, *, model: str = "ForCausalLM", **config: Any) -> Make:
    """A language model; its head may be tied to its embedding."""

    def make() -> Specimen:
        made = getattr(hf, f"{kind}Config")(**config)
        return Specimen(getattr(hf, f"{kind}{model}")(made), texts, continued, ("lm_head",))

    return make


def encoder_decoder(kind: str, model: str, **config: Any) -> Make:
    """A translator; its head is tied to its embedding."""

    def make() -> Specimen:
        made = getattr(hf, f"{kind}Config")(**config)
        return Specimen(getattr(hf, f"{kind}{model}")(made), pairs, translated, ("lm_head",))

    return make


def classifier(
    kind: str, suffix: str, inputs: Callable[..., dict[str, Tensor]], **config: Any
) -> Make:
    """A classifier of images or sounds."""

    def make() -> Specimen:
        made = getattr(hf, f"{kind}Config")(num_labels=LABELS, **config)
        return Specimen(getattr(hf, f"{kind}{suffix}")(made), inputs, classified)

    return make


def image(kind: str, **config: Any) -> Make:
    return classifier(kind, "ForImageClassification", IMAGES, **config)


def sound(kind: str, **config: Any) -> Make:
    return classifier(kind, "ForSequenceClassification", SOUNDS, **config)


def backbone(
    kind: str, model: str, inputs: Callable[..., dict[str, Tensor]], **config: Any
) -> Make:
    """A model without a head."""

    def make() -> Specimen:
        made = getattr(hf, f"{kind}Config")(**config)
        return Specimen(getattr(hf, f"{kind}{model}")(made), inputs, pooled)

    return make


def plain(
    build: Callable[[], nn.Module],
    inputs: Callable[..., dict[str, Tensor]],
    loss: Callable[..., Tensor] = pooled,
) -> Make:
    """A model of torch's own layers."""
    return lambda: Specimen(build(), inputs, loss)


SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
DECODER = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIDE,
    "patch_size": 4,
}
SPEECH: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
BART: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
WHISPER: dict[str, Any] = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 8,
    "classifier_proj_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}

T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}

LISTED: dict[str, Make] = {
    "BERT": text("Bert", **SIZES),
    "DistilBERT": text(
        "DistilBert",
        vocab_size=WORDS,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
    ),
    "RoBERTa": text("Roberta", padding=1, **SIZES),
    "ALBERT": text("Albert", embedding_size=8, **SIZES),
    "DeBERTa": text("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], **SIZES),
    "DeBERTa-v2": text(
        "DebertaV2",
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["c2p", "p2c"],
        **SIZES,
    ),
    "ELECTRA": text("Electra", embedding_size=8, **SIZES),
    "GPT-2": causal("GPT2", model="LMHeadModel", **GPT2),
    "OPT": causal(
        "OPT",
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    ),
    "Llama": text("Llama", **DECODER),
    "Mistral": causal("Mistral", **DECODER),
    "Qwen2": causal("Qwen2", tie_word_embeddings=True, **DECODER),
    "T5": encoder_decoder("T5", "ForConditionalGeneration", **T5),
    "BART": encoder_decoder("Bart", "ForConditionalGeneration", **BART),
    "ViT": image("ViT", **VISION),
    "DeiT": image("DeiT", **VISION),
    "BEiT": image("Beit", use_relative_position_bias=True, **VISION),
    "Swin": image(
        "Swin",
        image_size=SIDE,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "Wav2Vec2": sound("Wav2Vec2", **SPEECH),
    "Whisper encoder": classifier(
        "Whisper",
        "ForAudioClassification",
        partial(floats, shape=(8, 24), name="input_features"),
        **WHISPER,
    ),
}
"""The architectures the issue lists."""


class ConvNet(nn.Module):
    """Grouped, dilated and padded convolutions with a group norm, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=(1, 2), dilation=2)
        self.norm = nn.GroupNorm(2, 6)
        self.second = nn.Conv2d(6, 12, 3, groups=3, stride=2, padding="valid")
        self.head = nn.Linear(12, LABELS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = functional.silu(self.norm(self.first(pixel_values)))
        return self.head(functional.silu(self.second(hidden)).mean((2, 3)))


class Attending(nn.Module):
    """Torch's own attention, which turns records to the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Packed(nn.Module):
    """Drops padding before its linear layer: rows of one record follow those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(WORDS, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        own, hidden = attention_mask.bool(), self.embedding(input_ids)
        rows = self.linear(hidden[own]).tanh()
        return self.head(torch.zeros_like(hidden).masked_scatter(own[..., None], rows).sum(1))


class Mixing(nn.Module):
    """Centres by the batch: a record's loss depends on others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0))


def batch_statistics() -> nn.Module:
    """BatchNorm without running statistics normalises by the batch even in evaluation mode."""
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False))


def vectors(*shape: int) -> Callable[..., dict[str, Tensor]]:
    return partial(floats, shape=shape, name="input")


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


STAGES: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
}
ATTENDING_STAGES = {
    **STAGES,
    "sr_ratios": [2, 1],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
SHIFTED: dict[str, Any] = {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]}

OTHERS: dict[str, Make] = {
    "ModernBERT": text(
        "ModernBert",
        global_attn_every_n_layers=2,
        local_attention=4,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **SIZES,
    ),
    "MPNet": text("MPNet", padding=1, **SIZES),
    "BigBird": text("BigBird", attention_type="original_full", **SIZES),
    "RoFormer": text("RoFormer", embedding_size=8, **SIZES),
    "ConvBERT": text("ConvBert", embedding_size=8, conv_kernel_size=3, **SIZES),
    "SqueezeBERT": text(
        "SqueezeBert",
        embedding_size=16,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        intermediate_groups=2,
        output_groups=2,
        **SIZES,
    ),
    "ESM rotary": text("Esm", padding=1, position_embedding_type="rotary", **SIZES),
    "Funnel": text(
        "Funnel",
        vocab_size=WORDS,
        block_sizes=[1, 1],
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
    ),
    "Longformer": text("Longformer", padding=1, attention_window=4, **SIZES),
    "XLNet": text("XLNet", vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24),
    "GPT-Neo": causal(
        "GPTNeo",
        vocab_size=WORDS,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        intermediate_size=24,
        max_position_embeddings=32,
    ),
    "GPT-NeoX": causal("GPTNeoX", **SIZES),
    "GPT-J": causal("GPTJ", rotary_dim=4, **GPT2),
    "Gemma": causal("Gemma", head_dim=4, **DECODER),
    "Phi": causal("Phi", **DECODER),
    "Qwen3": causal("Qwen3", head_dim=4, **DECODER),
    "Falcon": causal("Falcon", **without(SIZES, "intermediate_size", "max_position_embeddings")),
    "BLOOM": causal("Bloom", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2),
    "MPT": causal(
        "Mpt",
        vocab_size=WORDS,
        d_model=16,
        n_layers=2,
        n_heads=2,
        expansion_ratio=2,
        max_seq_len=32,
    ),
    "Mixtral": causal(
        "Mixtral",
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",
        **DECODER,
    ),
    "Mamba": causal("Mamba", vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4),
    "T5 eager": encoder_decoder(
        "T5", "ForConditionalGeneration", attn_implementation="eager", **T5
    ),
    "Pegasus": encoder_decoder("Pegasus", "ForConditionalGeneration", **BART),
    "mBART": encoder_decoder("MBart", "ForConditionalGeneration", **BART),
    "Marian": encoder_decoder(
        "Marian", "MTModel", pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **BART
    ),
    "M2M100": encoder_decoder("M2M100", "ForConditionalGeneration", **BART),
    "ConvNeXt V2": image(
        "ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2
    ),
    "ResNet": image(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
    "RegNet": image(
        "RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4
    ),
    "DINOv2": image("Dinov2", mlp_ratio=2, **without(VISION, "intermediate_size")),
    "SegFormer": image("Segformer", **ATTENDING_STAGES),
    "PVT v2": image("PvtV2", image_size=SIDE, **ATTENDING_STAGES),
    "PoolFormer": image("PoolFormer", padding=[1, 1], **STAGES),
    "LeViT": classifier(
        "Levit",
        "ForImageClassification",
        partial(floats, shape=(3, 32, 32), name="pixel_values"),
        image_size=32,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        down_ops=[["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 4, 4, 2, 2]],
    ),
    "Swin V2": image("Swinv2", num_heads=[2, 2], window_size=4, **SHIFTED),
    "FocalNet": image(
        "FocalNet", focal_levels=[1, 1], focal_windows=[3, 3], hidden_sizes=[8, 16], **SHIFTED
    ),
    "CLIP vision": backbone("CLIPVision", "Model", IMAGES, **VISION),
    "SigLIP vision": backbone("SiglipVision", "Model", IMAGES, **VISION),
    "Hubert": sound("Hubert", **SPEECH),
    "WavLM": sound("WavLM", num_buckets=8, max_bucket_distance=16, **SPEECH),
    "Wav2Vec2 layer norm": sound(
        "Wav2Vec2", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, **SPEECH
    ),
    "AST": classifier(
        "AST",
        "ForAudioClassification",
        partial(floats, shape=(20, 8), name="input_values"),
        max_length=20,
        num_mel_bins=8,
        frequency_stride=4,
        time_stride=4,
        **without(VISION, "image_size"),
    ),
    "conv net": plain(ConvNet, IMAGES, classified),
    "nn.MultiheadAttention": plain(Attending, partial(floats, shape=(5, 8), name="x")),
    "nn.LSTM": plain(Recurrent, partial(floats, shape=(5, 8), name="x")),
    "packed": plain(Packed, texts, classified),
    "mixing": plain(Mixing, partial(floats, shape=(8,), name="x")),
    "batch statistics": plain(batch_statistics, vectors(8)),
}
"""Further architectures, and models that no single backward covers."""


def full(specimen: Specimen) -> None:
    """Everything."""
    specimen.model.requires_grad_(requires_grad=True)


def head_only(specimen: Specimen) -> None:
    """The head; where it is tied to the embedding, that is what trains."""
    output = getattr(specimen.model, "get_output_embeddings", lambda: None)()
    tied = set() if output is None else set(output.parameters())
    for name, parameter in specimen.model.named_parameters():
        parameter.requires_grad_(name.startswith(specimen.head) or parameter in tied)


def bitfit(specimen: Specimen) -> None:
    """Biases (norms, where a model has none) and the head."""
    head_only(specimen)
    named = dict(specimen.model.named_parameters())
    biases = [p for name, p in named.items() if name.endswith("bias")]
    for parameter in biases or [p for p in named.values() if p.dim() == 1]:
        parameter.requires_grad_(requires_grad=True)


def lora(specimen: Specimen) -> None:
    """Adapters of rank two beside every linear layer, and the head."""
    head_only(specimen)
    head = [p for p in specimen.model.parameters() if p.requires_grad]
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        fan_in_fan_out=isinstance(specimen.model, hf.GPT2PreTrainedModel),
    )
    peft.inject_adapter_in_model(config, specimen.model)
    for parameter in head:
        parameter.requires_grad_(requires_grad=True)


TUNINGS = {"full": full, "LoRA": lora, "head": head_only, "BitFit": bitfit}


def tuned(make: Make, tuning: str, *, stir: float = STIR) -> Specimen:
    """A specimen ready to train: nothing zero, and what its loss does not reach frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        specimen = make()
        TUNINGS[tuning](specimen)
        specimen.model.eval()
        with torch.no_grad():
            for parameter in specimen.model.parameters():
                parameter.add_(torch.randn_like(parameter) * stir)
    freeze_unreached(specimen)
    return specimen


def freeze_unreached(specimen: Specimen) -> None:
    """What a classifier inherits and does not use (a pooler, a mask's embedding) is frozen."""
    reached = [p for p in specimen.model.parameters() if p.requires_grad]
    losses = specimen.made(7)(np.arange(7)).sum()
    found = torch.autograd.grad(losses, reached, allow_unused=True)
    for parameter, gradient in zip(reached, found, strict=True):
        parameter.requires_grad_(gradient is not None)
