"""The backends that send a `Generation` to a replica: through the deployment's handle, or to an engine in this process."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from hydra_core.errors import StoppedError
from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.made_by import MadeBy
from pipelines.batch.openai_format import generation_of
from pipelines.batch.reader import URLS, BatchRow
from pipelines.batch.retry import TRIES, GivenUp, Overloaded, RetryPolicy, TooSlow
from pipelines.runtime.faults import first_line
from pipelines.serve.messages import Answer, AppArgs, Generation, Refusal
from pipelines.serve.openai.errors import ApiError
from pipelines.serve.openai.responses import CHAT, TEXT, response
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of

ENDED = "the job has ended"
AWAY = (BackPressureError, RayActorError, DeploymentUnavailableError, RequestCancelledError, TaskCancelledError, ObjectLostError,
        NodeDiedError)
"""Errors of a full queue, and of a replica or a machine that has gone, with an answer that it had made perhaps: ask again."""


class ServerError(Exception):
    """The server itself failed, at this row or at another one in the same batch."""


class Replicas:
    """What answers a `Generation`: all answers, or the reason why there are none.

    `answers` raises Overloaded, ServerError, and TooSlow after `seconds`; `stop` ends the requests in flight.
    """

    def answers(self, generation: Generation, seconds: float) -> list[Answer] | Refusal:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class DeploymentBackend:
    """Sends a `Generation` to the deployment, or to an engine of this process."""

    def __init__(self, settings: RequestSettings, replicas: Replicas) -> None:
        self.settings, self.replicas = settings, replicas
        self.retry_policy = RetryPolicy("the deployment", settings.row_seconds)
        self._made_by = MadeBy("the deployment", settings.serves, settings.made_by)
        self._suspect = threading.Lock()

    @property
    def made_by(self) -> str:
        return str(self._made_by)

    def stop(self) -> None:
        self.retry_policy.stop()
        self.replicas.stop()

    def ask(self, row: BatchRow) -> Response:
        settings = self.settings
        try:
            generation = generation_of(row, settings.model, settings.max_new_tokens, settings.temperature, settings.seed,
                                       settings.most_choices)
        except ApiError as error:
            return Response(error.status, error.message, body=error.body())
        try:
            found = self._with_retries(generation)
        except GivenUp as error:
            found = Refusal(504, str(error))
        if isinstance(found, Refusal):
            return Response(found.status, found.message, body=ApiError(found.status, found.message).body())
        for answer in found:
            self._made_by.check(answer.system_fingerprint, settings.model, settings.model)
        kind = CHAT if row.url == URLS[0] else TEXT
        body = response(kind, settings.model, generation, found) if row.body is not None else None
        return Response(200, columns=_answer_columns(found[0]), body=body)

    def _with_retries(self, generation: Generation) -> list[Answer] | Refusal:
        """Wait while the queue is full or a replica is replaced, and retry after a server error, `TRIES` times in all.

        An error fails every request in flight. They are retried one at a time, so that a row that causes the error uses up
        its own tries and those of no other row.
        """
        try:
            return self._answers(generation)
        except ServerError as error:
            why = str(error)
        with self._suspect:
            for tried in range(1, TRIES):
                self.retry_policy.pause(float(tried))
                try:
                    return self._answers(generation)
                except ServerError as error:
                    why = str(error)
        return Refusal(500, f"the server failed {TRIES} times: {why}")

    def _answers(self, generation: Generation) -> list[Answer] | Refusal:
        return self.retry_policy.wait(lambda: self._once(generation))

    def _once(self, generation: Generation) -> list[Answer] | Refusal:
        # a new id: an earlier request of this row may still be decoding, from a killed job or before its replica died
        found = self.replicas.answers(replace(generation, id=f"{generation.id}-{uuid.uuid4().hex}"), self.settings.row_seconds)
        if isinstance(found, Refusal) and found.in_flight:  # this row may be the reason: it is not asked again for ever
            raise ServerError(found.message)
        if isinstance(found, Refusal) and found.status in (429, 503):
            raise Overloaded(found.message)
        return found


def _answer_columns(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "token_ids": list(answer.token_ids), "tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason, "steps": answer.steps, "drafted": answer.drafted,
            "accepted": answer.accepted, "tokens_per_step": answer.tokens_per_step, "latency_seconds": answer.latency_seconds}


class Deployment(Replicas):
    """The replicas of a running application, through its handle."""

    def __init__(self, app_name: str) -> None:
        self.handle = serve.get_deployment_handle("DecodeServer", app_name)
        self._flying, self._stopped = set[Any](), False

    def answers(self, generation: Generation, seconds: float) -> list[Answer] | Refusal:
        if self._stopped:
            raise Overloaded(ENDED)
        flying = self.handle.answers.remote(generation)
        self._flying.add(flying)
        if self._stopped:  # perhaps since the set was looked at: nobody else would end the request
            _cancel(flying)
        try:
            found: list[Answer] | Refusal = flying.result(timeout_s=seconds)
            return found
        except TimeoutError:
            _cancel(flying)
            raise TooSlow(f"no answer in {seconds:g} s") from None
        except AWAY as error:
            raise Overloaded(first_line(error)) from None
        except RayTaskError as error:
            raise ServerError(first_line(error.cause or error)) from None
        finally:
            self._flying.discard(flying)

    def stop(self) -> None:
        self._stopped = True
        for flying in list(self._flying):
            _cancel(flying)


class Embedded(Replicas):
    """An engine in this process, with an event loop in a thread of its own."""

    def __init__(self, args: AppArgs) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it logs each answer, which is meant for a server's log
        self.server, self.loop, self._restarting = DecodeServer(args), asyncio.new_event_loop(), threading.Lock()
        threading.Thread(target=self.loop.run_forever, name="embedded", daemon=True).start()
        self._flying, self._stopped = set[Any](), False
        self._run(self.server.reconfigure(heads_of(args)), None)

    def answers(self, generation: Generation, seconds: float) -> list[Answer] | Refusal:
        try:
            with self._restarting:
                self._restart()
            found: list[Answer] | Refusal = self._run(self.server.answers(generation), seconds)
            return found
        except CancelledError:
            raise Overloaded(ENDED) from None
        except TimeoutError:
            raise TooSlow(f"no answer in {seconds:g} s") from None
        except RuntimeError as error:
            raise ServerError(first_line(error)) from None

    def stop(self) -> None:
        self._stopped = True
        for flying in list(self._flying):
            _cancel(flying)

    def _restart(self) -> None:
        """Make a failed engine again. Raises StoppedError where it hangs."""
        if self.server.failed and not self._stopped:
            try:
                self._run(self.server.restart(), None)
            except RuntimeError as error:
                raise StoppedError(f"{first_line(error)}: run again; every row that was answered is kept") from None

    def _run(self, work: Any, seconds: float | None) -> Any:
        if self._stopped:
            work.close()
            raise CancelledError
        flying = asyncio.run_coroutine_threadsafe(work, self.loop)
        self._flying.add(flying)
        if self._stopped:  # perhaps since the set was looked at: nobody else would end the request
            _cancel(flying)
        try:
            return flying.result(seconds)
        except TimeoutError:
            _cancel(flying)
            raise
        finally:
            self._flying.discard(flying)


def _cancel(flying: Any) -> None:
    """End a request. That it cannot be reached any more must not hide why it is ended, nor leave the others running."""
    with suppress(Exception):
        flying.cancel()
