"""Prune a Hugging Face model in its Trainer, from 5 % to 90 % sparsity, save it and load it again."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gmp_kernels.integrations.transformers import GMPCallback

torch.manual_seed(0)
# A small model with random weights, because a pretrained one would have to be downloaded:
# model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
config = BertConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=2
)
model = BertForSequenceClassification(config)

# Which of two tokens comes more often?
inputs = torch.randint(0, 2, (1024, 15))
data = [{"input_ids": row, "labels": label} for row, label in zip(inputs, (inputs.sum(1) > 7).long(), strict=True)]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=5,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        logging_steps=32,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = GMPCallback(0.9, frequency=16)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])  # the only line to change
    trainer.train()
    print(callback.run.pruner)  # what is pruned, what is left out, and why
    trainer.save_model(folder)
    loaded = BertForSequenceClassification.from_pretrained(folder)

names = callback.run.pruner.masks
zeros = sum(int((loaded.get_parameter(name) == 0).sum()) for name in names)
total = sum(loaded.get_parameter(name).numel() for name in names)
with torch.no_grad():
    accuracy = (loaded(inputs).logits.argmax(1) == (inputs.sum(1) > 7)).float().mean().item()
print(f"loaded: sparsity {zeros / total:.4f}, accuracy {accuracy:.3f}")
