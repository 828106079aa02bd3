"""Addresses that may hold a login: its password reaches no log, message or record, and no server but its own."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from urllib.parse import unquote, urlsplit

# The second form is a password with a slash, which no parser takes, in an address that is no HOST:PORT/PATH.
LOGIN = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d+[/?#])[^\s@]*)@")
TRAINING = "workflowType=machine_learning"  # without it MLflow's page is about GenAI


def is_server(uri: str) -> bool:
    """Whether an MLflow address is that of a server, not of a database."""
    return uri.startswith(("http://", "https://"))


def without_login(text: str) -> str:
    """A text whose addresses show `***` in place of user and password."""
    return LOGIN.sub("***@", text)


def bare(uri: str) -> str:
    """An address without user and password."""
    return LOGIN.sub("", uri)


def page(uri: str) -> str:
    """An address as it may be printed: a login page's query may hold secrets."""
    return without_login(re.split(r"[?#]", uri)[0])


def mlflow_ui() -> str:
    """Where people open MLflow: PTL_MLFLOW_UI, else the address that is used here; empty where that is no server."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return page(bare(os.environ.get("PTL_MLFLOW_UI") or uri)).rstrip("/") if is_server(uri) else ""


def experiments_page(server: str) -> str:
    """MLflow's list of experiments; what is opened from it stays in the mode of model training."""
    return f"{server}/#/experiments?{TRAINING}"


def runs_page(server: str, experiment: str, run: str = "") -> str:
    """MLflow's page of an experiment's runs, or of one of them. MLflow 3.17 reads only what follows the `#`."""
    return f"{server}/#/experiments/{experiment}/runs{f'/{run}' if run else ''}?{TRAINING}"


def split_login(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Move the login of MLFLOW_TRACKING_URI to the variables that MLflow has for it: it prints the address.

    A login in the address takes precedence over theirs, as it does in MLflow. Returns what this has set.
    """
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    try:
        parts = urlsplit(uri)
    except ValueError:  # no address at all, which its first use reports
        return {}
    if not is_server(uri) or not parts.password:
        return {}
    # In an address they are quoted, in the variables they are not.
    login = {
        "MLFLOW_TRACKING_USERNAME": unquote(parts.username or ""),
        "MLFLOW_TRACKING_PASSWORD": unquote(parts.password),
        "MLFLOW_TRACKING_URI": bare(uri),
    }
    environment.update(login)
    return login
