"""Adapters of the `peft` library: trained, saved, loaded on a fresh model, merged into its weights."""

import pytest

pytest.importorskip("peft", reason="adapters come from it; the models do not need it")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import peft
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from helpers import logged_warnings, write_repository
from lsg_albert import LSGAlbertForMaskedLM, LSGAlbertForSequenceClassification

needs_peft_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} asks for peft >= {MIN_PEFT_VERSION} in its own methods",
)

TARGETS = {"query and value": ["query", "value"], "all linear": "all-linear"}


@pytest.fixture(scope="module")
def repository(tiny_config, tmp_path_factory):
    """A classifier, whose layers are shared and whose activation can be fused with a linear layer."""
    torch.manual_seed(0)
    model = LSGAlbertForSequenceClassification(tiny_config(num_labels=2, hidden_act="gelu_new"))
    return write_repository(tmp_path_factory.mktemp("peft") / "repository", model)


def load(folder) -> LSGAlbertForSequenceClassification:
    return AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)


def with_lora(model, targets, **options) -> peft.PeftModel:
    """With adapters that change something already, unless they are to be trained."""
    options = {"init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, **options))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Seven blocks of text, and padding behind one of two rows."""
    ids = torch.randint(5, 120, (2, 56), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs) -> Tensor:
    return model.eval()(**inputs).logits


def data(size: int = 16) -> list[dict[str, Tensor]]:
    """Texts of one of two words each, which is what to tell."""
    return [{"input_ids": torch.full((40,), 10 + 50 * (i % 2)), "labels": torch.tensor(i % 2)} for i in range(size)]


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_trainer_trains_the_adapters_and_the_classifier_alone(repository, tmp_path, targets):
    model = with_lora(load(repository), targets, init_lora_weights=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    assert ("pooler" in " ".join(trained)) == (targets == "all-linear")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
        label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_saved_adapter_does_the_same_on_a_fresh_model(repository, inputs, tmp_path, targets):
    model = with_lora(load(repository), targets)
    model.save_pretrained(tmp_path)
    fresh = load(repository)
    plain = logits(fresh, inputs)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert (logits(loaded, inputs) - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
    with loaded.disable_adapter():
        assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_merged_model_is_an_ordinary_repository(repository, inputs, tmp_path, targets):
    model = with_lora(load(repository), targets)
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*")) and (tmp_path / "modeling_lsg_albert.py").is_file()
    with logged_warnings() as messages:
        loaded = load(tmp_path)
    assert not messages and not any("lora" in name for name in loaded.state_dict())
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-5, atol=1e-5)


ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=["ffn"], r=4, init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(target_modules=["ffn"], r=4, init_lora_weights=False, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["ffn"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_before_the_activation_counts_in_inference(repository, inputs, adapter):
    """There the activation is fused with a plain linear layer, whose weights are read past the module."""
    plain = load(repository)
    model = peft.get_peft_model(load(repository), ADAPTERS[adapter]())
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    with_gradients = model.eval()(**inputs).logits.detach()
    torch.testing.assert_close(logits(model, inputs), with_gradients, rtol=1e-5, atol=1e-5)
    assert (with_gradients - logits(plain, inputs)).abs().max() > 1e-2


@pytest.mark.skipif(
    transformers.__version__ == "5.0.0", reason="its `load_adapter` misses the names it saved, with any model"
)
@needs_peft_of_transformers
def test_an_adapter_by_transformers_itself(repository, inputs, tmp_path):
    model = load(repository)
    plain = logits(model, inputs)
    model.add_adapter(peft.LoraConfig(target_modules=["query", "ffn"], r=4, init_lora_weights=False))
    adapted = logits(model, inputs)
    assert (adapted - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    fresh = load(repository)
    fresh.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(fresh, inputs), adapted)


def test_all_linear_layers_of_a_masked_language_model_leave_its_tied_output_alone(tiny_config, tmp_path, inputs):
    folder = write_repository(tmp_path / "repository", LSGAlbertForMaskedLM(tiny_config()))
    load_masked = AutoModelForMaskedLM.from_pretrained
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    model = peft.get_peft_model(load_masked(folder, trust_remote_code=True), config)
    assert not any("lora" in name for name, _ in model.base_model.model.predictions.decoder.named_parameters())
    expected = logits(model, inputs)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = load_masked(tmp_path / "merged", trust_remote_code=True)
    assert loaded.predictions.decoder.weight is loaded.albert.embeddings.word_embeddings.weight
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-4, atol=1e-4)
