import pytest
import torch

from common.config import TaskName
from common.model import load_tokenizer
from common.tasks import TASKS

RECORDS, CLASSES = 6, 3


def test_there_are_tasks_and_each_name_has_one():
    """An empty list would make the whole suite below pass by testing nothing."""
    assert TASKS
    assert set(TASKS) == set(TaskName)


@pytest.fixture(params=list(TASKS), ids=lambda name: name.value)
def task(request):
    return TASKS[request.param]


@pytest.fixture
def logits():
    return torch.randn((RECORDS, CLASSES), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 0, 1, 2])


def test_loss_has_one_entry_a_record(task, logits, labels):
    loss = task.loss_vector(logits, labels)
    assert loss.shape == (RECORDS,)
    assert torch.isfinite(loss).all()
    assert (loss > 0).all()


def test_loss_of_a_record_does_not_change_with_the_others(task, logits, labels):
    """Clipping bounds one record's influence only if no other record is in its loss."""
    before = task.loss_vector(logits, labels)
    for record in range(RECORDS):
        others = torch.arange(RECORDS) != record
        changed, relabelled = logits.clone(), labels.clone()
        changed[others] = changed[others] * 3 + 1e3 * torch.randn(RECORDS - 1, CLASSES)
        relabelled[others] = (relabelled[others] + 1) % CLASSES
        after = task.loss_vector(changed, relabelled)
        assert torch.equal(after[record], before[record])
        assert not torch.equal(after[others], before[others])
    for keep in range(1, RECORDS):
        alone = task.loss_vector(logits[:keep], labels[:keep])
        assert torch.equal(alone, before[:keep])


def test_gradient_of_a_record_reaches_that_record_only(task, logits, labels):
    logits.requires_grad_()
    task.loss_vector(logits, labels)[2].backward()
    touched = logits.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False, False, False]


def test_loss_of_no_records_is_empty(task, logits, labels):
    """A Poisson sample may be empty."""
    assert task.loss_vector(logits[:0], labels[:0]).shape == (0,)


def test_right_answers_cost_less_than_wrong_ones(task, labels):
    sure = 5 * torch.eye(CLASSES)[labels]
    assert (task.loss_vector(sure, labels) < task.loss_vector(-sure, labels)).all()


@pytest.mark.parametrize("max_tokens", [4, 12])
def test_inputs_are_max_tokens_wide_whatever_the_texts_hold(task, tiny_config, max_tokens):
    """A width that follows the longest text would tell of it, and of the batch."""
    texts = ["goal", "goal match team " * 20, ""]
    tokenizer = load_tokenizer(tiny_config.model)
    encoded = task.encode(tokenizer, texts, max_tokens=max_tokens)
    assert {"input_ids", "attention_mask"} <= set(encoded)
    for tensor in encoded.values():
        assert tensor.shape == (3, max_tokens)
        assert tensor.dtype == torch.long
    assert encoded["attention_mask"].sum(1).tolist() == [3, max_tokens, 2]


def test_encoding_of_a_text_does_not_change_with_the_others(task, tiny_config):
    tokenizer = load_tokenizer(tiny_config.model)
    together = task.encode(tokenizer, ["goal match", "bank loan today said"], max_tokens=8)
    alone = task.encode(tokenizer, ["goal match"], max_tokens=8)
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], together[name][0])


def test_metrics_are_shares_and_the_best_is_one(task, logits, labels):
    perfect = task.metrics(10 * torch.eye(CLASSES)[labels], labels)
    worst = task.metrics(-10 * torch.eye(CLASSES)[labels], labels)
    middling = task.metrics(logits, labels)
    assert set(perfect) == set(worst) == set(middling)
    assert set(perfect.values()) == {1.0}
    for name, value in middling.items():
        assert isinstance(value, float)
        assert 0 <= worst[name] <= value <= 1
        assert worst[name] < 1
