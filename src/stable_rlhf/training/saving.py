"""What a run leaves behind: the policy in final/, its card, its upload."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from stable_rlhf.checkpoints import store
from stable_rlhf.config import flat_settings
from stable_rlhf.console import tell
from stable_rlhf.errors import CheckpointError, UploadError
from stable_rlhf.files import replace_text
from stable_rlhf.policy import SavedFault, save_policy, saved_fault
from stable_rlhf.runs import model_card
from stable_rlhf.training.hub import upload
from stable_rlhf.training.run import Run


class PolicySaving(Run):
    """A run that can save its policy, describe it, and upload it."""

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Saves a Transformers or PEFT folder with tokenizer and value heads; its path (default run_dir/final)."""
        folder = Path(output_dir or self.run_dir / "final")
        save_policy(self.model, self.processing_class, folder)
        return folder

    def save_final(self) -> None:
        """Saves the model in run_dir/final, whole or not at all: a kill leaves the folder as it was, or removed."""
        aside = self.save_model(self.run_dir / ".final")
        shutil.rmtree(self.run_dir / "final", ignore_errors=True)
        aside.rename(self.run_dir / "final")

    def load_best(self) -> None:
        """With ``load_best_model_at_end``: puts the weights of the best checkpoint into the policy."""
        best = self.counters.best_step
        if not self.args.load_best_model_at_end or best in (None, self.steps_done):
            return
        try:
            tensors, _ = store.load(store.at(self.run_dir / "checkpoints", best))
            self.model.load_trained_state(tensors["model"])
        except (CheckpointError, ValueError, KeyError) as error:
            tell(f"load_best_model_at_end: {error}; final/ holds the policy of the last step instead")
        else:
            self._evaluated = None

    def write_card(self, folder: Path) -> None:
        """Writes the model card, README.md, into a folder with the policy."""
        replace_text(folder / "README.md", model_card(self.run_dir, flat_settings(self.settings), self.model.peft))

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> str:
        """Uploads policy or adapter, tokenizer, value heads and model card as they are now; returns the address.

        ``repo_id``: None is ``hub_model_id``, or the name of the run's folder. ``kwargs``: ``private``, ``token``, and
        the options of huggingface_hub's ``upload_folder``, such as ``commit_message``. A repository that this makes is
        private unless ``hub_private`` or ``private`` says otherwise. Raises UploadError, also where what was saved does
        not load to the policy: nothing is then uploaded.
        """
        name = repo_id or self.args.hub_model_id or self.run_dir.name
        with tempfile.TemporaryDirectory(prefix="stable-rlhf-upload-") as folder:
            self.write_card(self.save_model(folder))
            fault = self._saved_fault(Path(folder))
            if fault is not None and fault.proven:
                raise UploadError(f"nothing was uploaded to {name!r}: the policy, saved to upload it, is bad: {fault}")
            return upload(Path(folder), name, **{"private": self.args.hub_private, **kwargs})

    def _saved_fault(self, folder: Path) -> SavedFault | None:
        return saved_fault(self.model, folder, self.args.model.trust_remote_code)

    def _finish(self) -> None:
        """Checks that final/ loads to the policy, describes it, and uploads it where ``push_to_hub`` asks for it.

        A policy that is not what was saved is not uploaded.
        """
        final = self.run_dir / "final"
        fault = self._saved_fault(final)
        self.write_card(final)
        if fault is not None and fault.proven and self.repository is not None:
            raise UploadError(
                f"{final}: {fault}. It was not uploaded to {self.repository!r}; training is finished, and the "
                f"checkpoints are whole: `stable-rlhf export {self.run_dir} NEW_FOLDER` writes the policy again"
            )
        if fault is not None:
            tell(f"{final}: {fault}")
        if self.repository is not None:
            try:
                self.events.uploading()
                upload(final, self.repository)
            except UploadError as error:
                raise UploadError(
                    f"{error}; training is finished and all is in {final}: upload it with `hf upload {self.repository} "
                    f"{final}`, or with push_to_hub() of the trainer"
                ) from error
