"""Checkpoints of Lightning's Trainer, of Accelerate and of Hugging Face's Trainer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints" / "interfaces.md"


@pytest.fixture
def client(daemon: DaemonProcess) -> Any:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


def script(heading: str) -> str:
    """The Python below *heading* of the page about interfaces."""
    _, _, below = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")
    found = re.search(r"^```python\n(.*?)^```", below, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_where_its_checkpoint_was(client: forebay.Client, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    from forebay.integrations.lightning import ForebayCheckpointIO

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.save_hyperparameters({"width": 4})
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.layer(batch).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    def fit(epochs: int, run: str, from_path: str | None = None) -> Net:
        keeper = lightning.pytorch.callbacks.ModelCheckpoint(
            dirpath=tmp_path / run, save_top_k=1, monitor="loss", save_last=True
        )
        trainer = lightning.Trainer(
            max_epochs=epochs,
            plugins=[ForebayCheckpointIO(client, run)],
            callbacks=[keeper],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            accelerator="cpu",
        )
        net = Net()
        generator = torch.Generator().manual_seed(9)
        batches = torch.utils.data.DataLoader(torch.randn(8, 4, generator=generator), batch_size=2)
        trainer.fit(net, batches, ckpt_path=from_path)
        return net

    whole = fit(4, "lightning-whole")
    fit(2, "lightning-parts")
    last = tmp_path / "lightning-parts" / "last.ckpt"
    assert last.stat().st_size < 300
    resumed = fit(4, "lightning-parts", str(last))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)

    plugin = ForebayCheckpointIO(client, "lightning-parts")
    found = plugin.load_checkpoint(last)
    assert found["hyper_parameters"] == {"width": 4}
    assert torch.equal(found["state_dict"]["layer.weight"], resumed.layer.weight)
    newest = plugin.load_checkpoint("lightning-parts@latest", map_location="cpu")
    assert newest["global_step"] == found["global_step"]
    kept = {path.name for path in (tmp_path / "lightning-parts").iterdir()}
    generations = client.checkpoints("lightning-parts")
    assert len(kept) <= len(generations) <= len(kept) + 1
    (tmp_path / "other.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(forebay.InvalidRequest, match="points to no generation"):
        plugin.load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_the_script_for_accelerate(client: forebay.Client) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed")

    def run(stop: int) -> torch.Tensor:
        torch.manual_seed(4)
        model = torch.nn.Linear(3, 2)
        names: dict[str, Any] = {
            "client": client,
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1),
            "batches": list(torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(1))),
            "num_steps": stop,
        }
        exec(compile(script("Accelerate"), str(PAGE), "exec"), names)  # noqa: S102 - our own page
        assert names["step"] == stop
        return model.weight.detach().clone()

    run(4)
    assert [one.step for one in client.checkpoints("accelerated")] == [4, 2]
    resumed = run(8)
    client.delete_checkpoints("accelerated")
    assert torch.equal(resumed, run(8))


@pytest.mark.filterwarnings("ignore")
def test_the_callback_for_hugging_face_s_trainer(client: forebay.Client, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    names: dict[str, Any] = {}
    exec(compile(script("Hugging Face Trainer"), str(PAGE), "exec"), names)  # noqa: S102 - ours

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).pow(2).mean()}

    def train(steps: int) -> Net:
        net, generator = Net(), torch.Generator().manual_seed(1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_strategy="no", report_to=[]
        )
        rows = [{"x": row} for row in torch.randn(64, 3, generator=generator)]
        callback = names["ForebayCallback"](client, "trained", every=2)
        transformers.Trainer(net, arguments, train_dataset=rows, callbacks=[callback]).train()
        return net

    trained = train(4)
    found = Net()
    with forebay.Checkpointer(client, "trained", model=found) as checkpointer:
        resumed = checkpointer.restore(only="model")
    assert resumed is not None
    assert resumed.step == 4
    assert torch.equal(found.layer.weight, trained.layer.weight)
