"""The engine on a GPU: the same clipped sum as a float64 loop on the CPU."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from client.clipping.engines import SingleBackward
from client.preflight import _reference


@pytest.mark.gpu
def test_a_clipped_sum_on_a_gpu_is_that_of_the_cpu():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    ids, labels = torch.randint(5, 99, (7, 12)), torch.arange(7) % 2

    def losses(of, device):
        return lambda at: functional.cross_entropy(
            of(input_ids=ids[at].to(device)).logits, labels[at].to(device), reduction="none"
        )

    reference = _reference(model, losses(model, "cpu"), 7, torch.float64)
    there = copy.deepcopy(model).cuda()
    sums = {}
    norms = SingleBackward(there).add_clipped(
        losses(there, "cuda"), np.arange(7), reference.clip_norm, sums
    )
    torch.testing.assert_close(norms.double().cpu(), reference.norms, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        found = sums[there.get_parameter(name)].double().cpu()
        torch.testing.assert_close(found, reference.sums[parameter], rtol=1e-3, atol=1e-6)
