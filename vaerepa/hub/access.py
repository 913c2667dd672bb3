"""Checks before training that the repository exists and may be written to."""

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from vaerepa.cli import option
from vaerepa.errors import OptionError
from vaerepa.hub.push import NO_SUCH_ROUTE, what_went_wrong
from vaerepa.training.options import OutputOptions

REVISION = re.compile(r"(?!.*(\.\.|//))\w[\w./-]*")


@dataclass
class HubOptions:
    """The repository, the token, and what is pushed when."""

    push_to_hub: bool = option(
        False,
        "Push the model to the Hub, in the background. Exit code 3: the last push failed, the run did not.",
        group="Hub",
    )
    hub_model_id: str | None = option(
        None,
        "Repository to push to, user/name. Default: the name of --output_dir, in your own account.",
        goes_with="push_to_hub",
    )
    hub_token: str | None = option(
        None,
        "Token for the Hub. Better: log in with `hf auth login`, or set HF_TOKEN. It is saved nowhere.",
        secret=True,
    )
    hub_private_repo: bool = option(
        False, "Make the repository a private one, when it is not there yet.", goes_with="push_to_hub"
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save",
        "What is pushed when, as in transformers' Trainer: the model at the end; or at every save; or with it the newest "
        "training state, as last-checkpoint/; or every one, as checkpoint-N/. Each push is a commit with the tag step-N.",
    )
    hub_revision: str | None = option(
        None,
        "Branch to push to, made when it is not there; its tags are named REVISION-step-N. Default: main.",
        goes_with="push_to_hub",
    )
    hub_license: str = option("unknown", "Licence in the model card, as the Hub spells it, for example apache-2.0.")


class PushOptions(OutputOptions, HubOptions):
    """Options of the Hub, and of the output folder that is pushed."""


def take_token(options: HubOptions) -> HubOptions:
    """Moves --hub_token into this process' environment, where huggingface_hub looks; nothing else keeps it."""
    if options.hub_token is None:
        return options
    os.environ["HF_TOKEN"] = options.hub_token
    for place, argument in reversed(list(enumerate(sys.argv))):  # from where the command to go on is printed
        flag, has_value, _ = argument.partition("=")
        if flag.replace("-", "_") == "__hub_token":
            del sys.argv[place : place + (1 if has_value else 2)]
    return replace(options, hub_token=None)


def check_names(options: PushOptions) -> None:
    """Checks the Hub's options against each other, without asking the Hub.

    Raises:
        OptionError: a name that the Hub does not take, a token that would be recorded.
    """
    if options.hub_token and options.report_to not in ("none", "tensorboard"):
        raise OptionError(
            f"--report_to {options.report_to} records the command line, and with it --hub_token. Give the token in the "
            "environment, as HF_TOKEN, or log in with `hf auth login`."
        )
    if options.hub_revision is not None and not REVISION.fullmatch(options.hub_revision):
        raise OptionError(f"--hub_revision {options.hub_revision}: this is no name for a branch.")
    try:
        if options.push_to_hub:
            validate_repo_id(_wanted_id(options))
    except HFValidationError as error:
        raise OptionError(
            f"--hub_model_id {_wanted_id(options)}: expected user/name, of letters, digits, and - _ . between them."
        ) from error


def open_repository(options: PushOptions) -> str:
    """Creates the repository and its branch where they do not exist, and returns the repository's id.

    Raises:
        OptionError: nobody is logged in, the Hub cannot be reached, or refuses.
    """
    if constants.HF_HUB_OFFLINE:
        raise OptionError(
            "--push_to_hub: HF_HUB_OFFLINE is set. Unset it, or push later with `python -m vaerepa.hub.push`."
        )
    if get_token() is None:
        raise OptionError("--push_to_hub: nobody is logged in. Run `hf auth login`, or set HF_TOKEN.")
    api, repo_id = HfApi(), _wanted_id(options)
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=options.hub_private_repo or None, exist_ok=True)
        _check_rights(api, repo_id)
        if options.hub_revision:
            api.create_branch(repo_id, branch=options.hub_revision, exist_ok=True)
        _check_license(options.hub_license)
    except HfHubHTTPError as error:
        raise OptionError(f"--push_to_hub: {what_went_wrong(error)} ({repo_id}).") from error
    except OptionError:
        raise
    except Exception as error:  # the network: its kinds differ between versions of huggingface_hub
        raise OptionError(
            f"--push_to_hub: {os.environ.get('HF_ENDPOINT', 'the Hub')} cannot be reached: {what_went_wrong(error)}."
        ) from error
    return repo_id


def _check_rights(api: HfApi, repo_id: str) -> None:
    """Checks write access to the repository; on a Hub without this API, that the repository exists."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in NO_SUCH_ROUTE:
            raise
        api.model_info(repo_id)


def _check_license(name: str) -> None:
    """Lets the Hub validate the card; it refuses pushes with an invalid one."""
    card = {"repoType": "model", "content": f"---\nlicense: {name}\n---\n"}
    try:  # not by ModelCard.validate, which knows one endpoint only in huggingface_hub 1
        hf_raise_for_status(get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=card))
    except BadRequestError as error:
        raise OptionError(f"--hub_license {name}: {what_went_wrong(error)}") from error


def _wanted_id(options: PushOptions) -> str:
    return options.hub_model_id or Path(options.output_dir).resolve().name
