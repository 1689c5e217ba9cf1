"""Random-initialised models of ``transformers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.base import Case, N, case, pair, rows


def padded_tokens(length: int = 6, vocabulary: int = 20) -> Callable[[], dict[str, Tensor]]:
    """Token ids (pad id 0) and their attention mask, with rows of several lengths."""

    def build() -> dict[str, Tensor]:
        ids = torch.randint(1, vocabulary, (N, length))
        mask = (torch.arange(length) < torch.tensor([6, 4, 5, 6, 3, 6])[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    return build


def hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A random-initialised model of ``transformers``."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(num_labels=3, **options))

    return build


SMALL = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": 0,
}  # fmt: skip


def hf_bert() -> Case:
    """Post-norm: the three embeddings in front of the first LayerNorm."""
    build = hf("BertForSequenceClassification", "BertConfig", max_position_embeddings=8, **SMALL)
    group = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    return case(70, build, padded_tokens(), [group], scale_weights=0.3)


def hf_gpt2() -> Case:
    """Pre-norm: one residual stream."""
    build = hf(
        "GPT2ForSequenceClassification", "GPT2Config", vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    stream = {"transformer.wte.weight", "transformer.wpe.weight"}
    for i in range(2):
        stream |= {f"transformer.h.{i}.{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")}
    return case(71, build, padded_tokens(), [stream], scale_weights=0.3)


def hf_gpt2_language_model() -> Case:
    """The token embedding is the head as well, so the whole stream is held back: none."""
    build = hf(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return case(72, build, padded_tokens(), [], scale_weights=0.3)


def hf_llama() -> Case:
    """RMSNorm pre-norm stream; its norm runs in float32, which limits the numerical check."""
    build = hf(
        "LlamaForSequenceClassification", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=8,
        rms_norm_eps=1e-9, **SMALL,
    )  # fmt: skip
    stream = {"model.embed_tokens.weight"}
    for i in range(2):
        stream |= {f"model.layers.{i}.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj")}
    return case(73, build, padded_tokens(), [stream], tolerance=1e-5, scale_weights=0.3)


def hf_distilbert() -> Case:
    """Post-norm: the two embeddings."""
    build = hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=20, dim=16, n_layers=2, n_heads=2,
        hidden_dim=24, max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    group = {f"distilbert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
    return case(74, build, padded_tokens(), [group], scale_weights=0.3)


def hf_vit() -> Case:
    """Patches, class token, positions and the outputs of every block."""
    build = hf(
        "ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    # transformers 5 and 4 name the layers differently.
    blocks = [f"vit.layers.{i}.{part}" for i in range(2) for part in ("attention.o_proj", "mlp.fc2")]
    blocks += [f"vit.encoder.layer.{i}.{part}.dense" for i in range(2) for part in ("attention.output", "output")]
    stream = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    stream = stream.union(*pair("vit.embeddings.patch_embeddings.projection", *blocks))
    example = lambda: {"pixel_values": rows(1, 8, 8)()}  # noqa: E731
    vit = case(75, build, example, [stream], scale_weights=0.3)
    vit.groups[0] &= {name for name, _ in vit.net.named_parameters()}
    return vit


def hf_convnext() -> Case:
    """Patches and each depthwise convolution; their biases bar the residual streams that run through them."""
    build = hf(
        "ConvNextForImageClassification", "ConvNextConfig", num_channels=1, patch_size=2, num_stages=2,
        hidden_sizes=[6, 8], depths=[1, 2], image_size=8, layer_scale_init_value=0.5,
    )  # fmt: skip
    names = [f"convnext.encoder.stages.{s}.layers.{i}.dwconv" for s, i in ((0, 0), (1, 0), (1, 1))]
    example = lambda: {"pixel_values": rows(1, 8, 8)()}  # noqa: E731
    return case(76, build, example, pair("convnext.embeddings.patch_embeddings", *names), scale_weights=0.3)


def hf_resnet() -> Case:
    """Every convolution has its BatchNorm."""
    build = hf(
        "ResNetForImageClassification", "ResNetConfig", num_channels=1, embedding_size=4, hidden_sizes=[4, 6],
        depths=[1, 2], layer_type="basic",
    )  # fmt: skip
    stages = "resnet.encoder.stages"
    names = ["resnet.embedder.embedder", f"{stages}.1.layers.0.shortcut"]
    names += [f"{stages}.{s}.layers.{i}.layer.{j}" for s, i in ((0, 0), (1, 0), (1, 1)) for j in (0, 1)]
    example = lambda: {"pixel_values": rows(1, 16, 16)()}  # noqa: E731
    return case(77, build, example, [{f"{name}.convolution.weight"} for name in names], scale_weights=0.3)


def hf_roformer() -> Case:
    """Post-norm with rotary positions: the embeddings in front of the first LayerNorm."""
    build = hf("RoFormerForSequenceClassification", "RoFormerConfig", max_position_embeddings=8, **SMALL)
    group = {f"roformer.embeddings.{kind}_embeddings.weight" for kind in ("word", "token_type")}
    return case(78, build, padded_tokens(), [group], scale_weights=0.3)


BUILDERS = (
    hf_bert, hf_gpt2, hf_gpt2_language_model, hf_llama, hf_distilbert, hf_vit, hf_convnext, hf_resnet, hf_roformer,
)  # fmt: skip
