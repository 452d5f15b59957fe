"""Which replica takes a request: a pure choice over reports, reservations and known prefixes.

Owns the fleet's soft state and the policy. Knows no handle, no clock and no chance: time and draws
are arguments. Invariant: everything here is rebuilt from the replicas' own reports; a router that
starts empty is right a second later, and several routers need not talk to each other.

The score of a replica is the time in ms that the request's work would take there: prompt tokens
that wait before it, its own without those that the replica's cache is likely to hold, and, at a
discount, the tokens still to be decoded. Prefix affinity, load and speed so trade in one unit
(prior art: Dynamo's prefill plus decode blocks). Affinity is bounded per request, never switched
off for the whole fleet: a replica with more than its share of the work (Mirrokni and others,
"Consistent Hashing with Bounded Loads", 2018) takes no request for the sake of a session or a
region. Among equals the better of two drawn is taken, so that routers with equal news do not herd
(Mitzenmacher, IEEE TPDS 12(10), 2001).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import NoReturn

from serve_app.core.ejection import Breaker
from serve_app.core.errors import ModelNotAvailableError, NoHostsAvailableError, OverloadedError
from serve_app.core.inference import NO_NEWS, AdmitRequest, ReplicaLoad, ReplicaNews
from serve_app.core.prefix import BLOCK_TOKENS, PrefixIndex

REPORT_TTL_MS = 3_000  # a replica that has not reported for so long is not offered
FORGET_MS = 60_000  # and after so long it is forgotten; a restarted one has another id
RESERVATION_MS = 10_000  # a grant's life: by then the request has arrived or never will
SESSIONS_MAX = 50_000  # remembered; the least recently used leave
INDEX_BLOCKS_MAX = 65_536  # per replica that does not say how much its cache holds: 4 M tokens
PREFILL_MS = 0.5  # per token, until a replica has measured its own
STEP_MS = 10.0
DECODE_WEIGHT = 0.2  # a token to decode shares its step with all others: cheaper than its prefill
RECOMPUTE_WEIGHT = 1.0  # what is computed twice delays the others too, not only its own request
BOUND = 1.5  # affinity ends where a replica's score is over so many times the mean …
BOUND_SLACK_MS = 200.0  # … and so much more: with little to do nobody is overloaded
EQUAL_MS = 2.0  # scores closer than this, or than a twentieth, are equal
CANDIDATES_SHOWN = 8
EJECTED = "ejected"
FULL = "full"


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says of itself.

    Args:
        phase: starting, ready, draining or failed.
        detail: why it failed, or how far it has come; for people.
    """

    load: ReplicaLoad
    phase: str
    detail: str
    at_ms: int
    news: ReplicaNews = NO_NEWS


@dataclass(frozen=True, slots=True)
class Candidate:
    """How one replica looked to one request.

    Args:
        score_ms: the less the better.
        ttft_ms: expected time to the first token.
        overlap_tokens: of the prompt, likely in its cache by then.
        held_tokens: of the prompt, in its cache as far as its reports say.
        refusal: why it was no choice; empty: it was one.
    """

    replica_id: str
    score_ms: float = 0.0
    ttft_ms: float = 0.0
    overlap_tokens: int = 0
    held_tokens: int = 0
    running_count: int = 0
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen replica, why, and what was compared, best first, at most `CANDIDATES_SHOWN`.

    `reason` is host, session, region, prefix, load or tie.
    """

    load: ReplicaLoad
    reason: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the router decided for one request, and what came of it.

    Args:
        chosen, candidates: with the expected time to the first token.
        ttft_ms: as the replica measured it later; None: not yet, or never.
        cached_tokens: as the engine found them.
    """

    request_id: str
    at_ms: int
    model: str
    prompt_tokens: int
    reason: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    ttft_ms: float | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Reservation:
    replica_id: str
    prefill_tokens: int
    decode_tokens: int
    expires_at_ms: int


@dataclass(slots=True)
class _Replica:
    """What the router itself knows of a replica."""

    index: PrefixIndex
    breaker: Breaker = field(default_factory=Breaker)
    prefill_tokens: int = 0  # reserved
    decode_tokens: int = 0
    reserved_count: int = 0


@dataclass(slots=True)
class Fleet:
    """The latest report of each replica, and what was sent there since."""

    reports: dict[str, ReplicaReport] = field(default_factory=dict)
    reserved: dict[str, _Reservation] = field(default_factory=dict)
    sessions: dict[str, str] = field(default_factory=dict)
    _known: dict[str, _Replica] = field(default_factory=dict)

    def hear(self, report: ReplicaReport) -> None:
        """Take a report; it replaces the replica's last one."""
        replica_id = report.load.replica_id
        self.reports[replica_id] = report
        for request_id in report.news.arrived:
            self._release(request_id)
        known = self._replica(report.load)
        known.breaker.hear(report.load, report.at_ms)
        for begun in report.news.begun:
            known.index.hold(begun.prefix)
            known.breaker.began()
            if begun.session:
                self._remember(begun.session, replica_id)
        self._forget(report.at_ms)

    def choose(
        self, request: AdmitRequest, now_ms: int, draws: tuple[float, float] = (0.0, 0.0)
    ) -> Choice:
        """Choose a replica and reserve the request's work there.

        `draws` are two numbers in [0, 1), from `ports.Entropy`.

        Raises:
            ModelNotAvailableError: no report names the model.
            OverloadedError: one that may take the request has no room yet.
            NoHostsAvailableError: none that serves it may take the request; the message says why.
                Also when none has reported at all: a router that has just started does not know
                which models there are.
        """
        choice = self.rank(request, now_ms, draws)
        replica_id = choice.load.replica_id
        uncached = max(0, request.prompt_tokens - choice.chosen.overlap_tokens)
        decode = max(0, request.token_count - request.prompt_tokens)
        self._release(request.request_id)  # of an earlier try
        self.reserved[request.request_id] = _Reservation(
            replica_id, uncached, decode, now_ms + RESERVATION_MS
        )
        known = self._replica(choice.load)
        known.prefill_tokens += uncached
        known.decode_tokens += decode
        known.reserved_count += 1
        known.index.expect(request.prefix)
        known.breaker.chosen(now_ms)
        if request.session:
            self._remember(request.session, replica_id)
        return choice

    def rank(
        self, request: AdmitRequest, now_ms: int, draws: tuple[float, float] = (0.0, 0.0)
    ) -> Choice:
        """What `choose` would answer now; reserves nothing."""
        self._lapse(now_ms)
        self._note_losses(request, now_ms)
        serving = [r for r in self.reports.values() if _serves(r.load, request.model)]
        if not serving:
            _refuse_model(request.model, self.reports.values())
        seen = [self._candidate(report, request, now_ms) for report in serving]
        # An ejected replica is still better than none.
        able = [one for one in seen if one.refusal in {"", EJECTED}]
        open_ones = sorted([one for one in able if not one.refusal] or able, key=_by_score)
        if not open_ones and any(one.refusal == FULL for one in seen):
            raise OverloadedError(_no_host(request, seen))
        if not open_ones:
            raise NoHostsAvailableError(_no_host(request, seen))
        chosen, reason = _pick(open_ones, self._wish(request), draws)
        shown = (*open_ones, *(one for one in seen if one not in open_ones))[:CANDIDATES_SHOWN]
        return Choice(self.reports[chosen.replica_id].load, reason, chosen, shown)

    def overlap_tokens(self, request: AdmitRequest) -> int:
        """Of the prompt, what the replica that knows most of it is likely to hold."""
        known = (one.index.overlap(request.prefix)[0] for one in self._known.values())
        return min(max(known, default=0) * BLOCK_TOKENS, request.prompt_tokens)

    def learn(self, chosen: Candidate, cached_tokens: int) -> None:
        """What the engine found in its cache of a prompt that `choose` sent there."""
        known = self._known.get(chosen.replica_id)
        if known is not None:
            known.index.learn(chosen.held_tokens, cached_tokens)

    def _candidate(self, report: ReplicaReport, request: AdmitRequest, now_ms: int) -> Candidate:
        load = report.load
        known = self._replica(load)
        expected, held = known.index.overlap(request.prefix)
        # The last token is always computed, and an estimate must not make the prompt negative.
        most = max(0, request.prompt_tokens - 1)
        overlap = min(expected * BLOCK_TOKENS, most)
        pace = load.prefill_ms or PREFILL_MS
        own = request.prompt_tokens - overlap
        waiting = load.prefill_tokens + known.prefill_tokens
        ttft_ms = (waiting + own) * pace + (load.step_ms or STEP_MS)
        pending = max(0, load.queued_tokens - load.prefill_tokens) + known.decode_tokens
        candidate = Candidate(
            load.replica_id,
            score_ms=ttft_ms + (own * RECOMPUTE_WEIGHT + pending * DECODE_WEIGHT) * pace,
            ttft_ms=ttft_ms,
            overlap_tokens=overlap,
            held_tokens=min(held * BLOCK_TOKENS, most),
            running_count=load.running_count,
        )
        refusal = _refusal(report, candidate, request, now_ms)
        if known.breaker.is_stalled(now_ms):
            refusal = refusal or "stalled"
        if not refusal and not request.is_resumed and load.slots:
            refusal = FULL if load.open_count + known.reserved_count >= load.slots else ""
        if refusal:
            return Candidate(load.replica_id, refusal=refusal)
        is_shunned = known.breaker.is_shunned(now_ms)
        return replace(candidate, refusal=EJECTED) if is_shunned else candidate

    def _note_losses(self, request: AdmitRequest, now_ms: int) -> None:
        for replica_id in request.excluded:
            known = self._known.get(replica_id)
            if known is not None:
                known.breaker.lost(request.request_id, now_ms)

    def _wish(self, request: AdmitRequest) -> "_Wish":
        region = request.placement.region
        there = frozenset(
            replica_id
            for replica_id, r in self.reports.items()
            if region and r.load.region == region
        )
        return _Wish(request.placement.host, self.sessions.get(request.session, ""), there)

    def _release(self, request_id: str) -> None:
        reservation = self.reserved.pop(request_id, None)
        known = self._known.get(reservation.replica_id) if reservation is not None else None
        if reservation is not None and known is not None:
            known.prefill_tokens -= reservation.prefill_tokens
            known.decode_tokens -= reservation.decode_tokens
            known.reserved_count -= 1

    def _replica(self, load: ReplicaLoad) -> _Replica:
        known = self._known.get(load.replica_id)
        if known is None:
            size = load.kv_tokens // BLOCK_TOKENS or INDEX_BLOCKS_MAX
            index = PrefixIndex(min(size, INDEX_BLOCKS_MAX))
            known = self._known[load.replica_id] = _Replica(index)
        return known

    def _remember(self, session: str, replica_id: str) -> None:
        self.sessions.pop(session, None)
        self.sessions[session] = replica_id
        if len(self.sessions) > SESSIONS_MAX:
            del self.sessions[next(iter(self.sessions))]

    def _lapse(self, now_ms: int) -> None:
        # In order of making, and all live equally long, so the first young one ends the search.
        lapsed = []
        for request_id, reservation in self.reserved.items():
            if reservation.expires_at_ms > now_ms:
                break
            lapsed.append(request_id)
        for request_id in lapsed:
            self._release(request_id)

    def _forget(self, now_ms: int) -> None:
        gone = [key for key, r in self.reports.items() if now_ms - r.at_ms > FORGET_MS]
        for replica_id in gone:
            del self.reports[replica_id]
            self._known.pop(replica_id, None)


@dataclass(frozen=True, slots=True)
class _Wish:
    host: str
    session_home: str
    region: frozenset[str]


def _pick(
    ranked: Sequence[Candidate], wish: _Wish, draws: tuple[float, float]
) -> tuple[Candidate, str]:
    """One of the candidates, which come best first, and why."""
    if wish.host:
        return ranked[0], "host"
    limit_ms = BOUND * sum(one.score_ms for one in ranked) / len(ranked) + BOUND_SLACK_MS
    within = [one for one in ranked if one.score_ms <= limit_ms]
    for one in within:
        if one.replica_id == wish.session_home:
            return one, "session"
    near = [one for one in within if one.replica_id in wish.region]
    pool = near or within
    best = pool[0]
    band_ms = max(EQUAL_MS, best.score_ms / 20)
    equals = [one for one in pool if one.score_ms <= best.score_ms + band_ms]
    if len(equals) > 1:
        first, second = (equals[int(draw * len(equals))] for draw in draws)
        best = min(first, second, key=_by_score)
    if near:
        return best, "region"
    if best.overlap_tokens > min(one.overlap_tokens for one in pool):
        return best, "prefix"
    return best, "tie" if len(equals) > 1 else "load"


def _refusal(
    report: ReplicaReport, candidate: Candidate, request: AdmitRequest, now_ms: int
) -> str:
    load, wanted = report.load, request.placement
    checks = MappingProxyType(
        {
            "another host": bool(wanted.host) and load.replica_id != wanted.host,
            "silent": now_ms - report.at_ms >= REPORT_TTL_MS,
            report.phase: report.phase != "ready",
            "lost this request": load.replica_id in request.excluded,
            "stake": bool(wanted.min_stake)
            and decimal_of(load.stake) < decimal_of(wanted.min_stake),
            "latency": wanted.max_latency_ms is not None
            and candidate.ttft_ms > wanted.max_latency_ms,
        }
    )
    return next((words for words, is_so in checks.items() if is_so), "")


def decimal_of(text: str) -> Decimal:
    """A stake as a number; what is no number counts as 0."""
    try:
        value = Decimal(text or "0")
    except InvalidOperation:
        return Decimal(0)
    return value if value.is_finite() else Decimal(0)


def _serves(load: ReplicaLoad, model: str) -> bool:
    return not model or model in load.models


def _refuse_model(model: str, reports: Iterable[ReplicaReport]) -> NoReturn:
    known = sorted({name for report in reports for name in report.load.models})
    if known:
        raise ModelNotAvailableError(f"no model {model!r}; available: {', '.join(known)}")
    raise NoHostsAvailableError("no model replica has reported yet")


def _no_host(request: AdmitRequest, seen: Sequence[Candidate]) -> str:
    host = request.placement.host
    if host:
        named = [one.refusal for one in seen if one.replica_id == host]
        return f"host {host} cannot take it: {named[0] if named else 'not here'}"
    counts: dict[str, int] = {}
    for one in seen:
        counts[one.refusal] = counts.get(one.refusal, 0) + 1
    why = ", ".join(f"{count} {words}" for words, count in sorted(counts.items()))
    return f"no replica of {request.model or 'the model'} is ready: {why}"


def _by_score(candidate: Candidate) -> tuple[float, int, str]:
    return candidate.score_ms, candidate.running_count, candidate.replica_id
