"""`/v1/workflows`: definitions by immutable version.

Owns the two forms a definition may come in and the shape it is shown in. Invariant: what is not
accepted changes nothing, and its answer names every problem and its place.
"""

import asyncio

import yaml
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import Validation, WorkflowList, WorkflowView
from serve_app.core.auth import Scope
from serve_app.core.errors import (
    InvalidWorkflowError,
    MalformedJsonError,
    Problem,
    UnknownWorkflowError,
)
from serve_app.core.workflow import Workflow
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import Services, services_of
from serve_app.ingress.bodies import parse_json, read_body
from serve_app.ingress.openapi import described
from serve_app.ingress.views import timestamp

router = APIRouter(prefix="/v1/workflows", tags=["workflows"])

DEFINITION_BYTES_MAX = 256 * 1024  # YAML is slow to read; the largest sensible one has some 50 KiB
_YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_EXAMPLE = {"steps": [{"id": "say", "transform": {"greeting": "Hello {{ input.name }}"}}]}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "object"}, "example": _EXAMPLE}
            for kind in ("application/json", "application/yaml")
        },
    }
}


@router.put(
    "/{workflow_id}",
    response_model=WorkflowView,
    responses={**ERRORS, 201: {"model": WorkflowView, "description": "The first version"}},
    openapi_extra=_BODY,
    summary="Store a definition",
)
async def put_workflow(request: Request, workflow_id: str) -> Response:
    """201 for a new workflow, 200 for a new version or an unchanged one."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    document = await _definition(request, services, workflow_id)
    was_known = workflow_id in await services.catalog.ids(principal.workspace)
    defined = await services.catalog.define(principal.workspace, document)
    versions = await services.catalog.versions(principal.workspace, workflow_id)
    view = _view(defined.workflow, defined.version, versions[defined.version])
    return json_response(view, 200 if was_known else 201)


@router.get("", response_model=WorkflowList, responses=ERRORS, summary="Visible definitions")
async def list_workflows(request: Request) -> Response:
    """The workspace's own and the shipped ones, latest versions, by id."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    items = [
        await _latest(services, principal.workspace, workflow_id)
        for workflow_id in await services.catalog.ids(principal.workspace)
    ]
    return json_response({"items": items, "nextCursor": None})


@router.get(
    "/{workflow_id}",
    response_model=WorkflowView,
    responses=ERRORS,
    openapi_extra=described(
        query={"version": ({"type": "integer", "minimum": 1}, "The latest, if left out.")}
    ),
    summary="A definition",
)
async def get_workflow(request: Request, workflow_id: str) -> Response:
    """The latest version, or `?version=`."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    asked = request.query_params.get("version")
    if asked is None:
        return json_response(await _latest(services, principal.workspace, workflow_id))
    versions = await services.catalog.versions(principal.workspace, workflow_id)
    if not (asked.isascii() and asked.isdigit() and int(asked[:9]) in versions):
        raise UnknownWorkflowError(f"workflow {workflow_id!r} has no version {asked[:20]!r}")
    version = int(asked)
    workflow = await services.catalog.version(principal.workspace, workflow_id, version)
    return json_response(_view(workflow, version, versions[version]))


@router.get(
    "/{workflow_id}/versions",
    response_model=WorkflowList,
    responses=ERRORS,
    summary="All versions of a definition",
)
async def list_versions(request: Request, workflow_id: str) -> Response:
    """Newest first."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    versions = await services.catalog.versions(principal.workspace, workflow_id)
    items = []
    for version, at_ms in sorted(versions.items(), reverse=True):
        workflow = await services.catalog.version(principal.workspace, workflow_id, version)
        items.append(_view(workflow, version, at_ms))
    return json_response({"items": items, "nextCursor": None})


@router.delete("/{workflow_id}", status_code=204, responses=ERRORS, summary="Remove a definition")
async def delete_workflow(request: Request, workflow_id: str) -> Response:
    """Running executions keep their version; a shipped one of the same id shows again."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    if not await services.catalog.undefine(principal.workspace, workflow_id):
        raise UnknownWorkflowError(f"no workflow {workflow_id!r} of this workspace's own")
    return Response(status_code=204)


@router.post(
    "/{workflow_id}/validate",
    response_model=Validation,
    responses=ERRORS,
    openapi_extra=_BODY,
    summary="Check a definition without storing it",
)
async def validate_workflow(request: Request, workflow_id: str) -> Response:
    """200 in both cases; `errors` says which step and why."""
    services = services_of(request)
    await services.authenticator.principal(request, Scope.READ)
    document = await _definition(request, services, workflow_id)
    try:
        services.catalog.check(document)
    except InvalidWorkflowError as error:
        errors = [{"loc": list(p.loc), "msg": p.msg} for p in error.problems]
        return json_response({"valid": False, "errors": errors})
    return json_response({"valid": True, "errors": []})


async def _definition(request: Request, services: Services, workflow_id: str) -> object:
    body = await read_body(request, DEFINITION_BYTES_MAX)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in _YAML_TYPES:
        try:
            document: object = await asyncio.to_thread(yaml.safe_load, body)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise MalformedJsonError(f"the body is no YAML: {str(error)[:300]}") from error
    else:
        document = parse_json(body, services.settings.json_depth_max)
    if not isinstance(document, dict):
        return document
    given = document.setdefault("id", workflow_id)
    if given != workflow_id:
        problem = Problem(("id",), f"the address says {workflow_id!r}; leave id out or repeat it")
        raise InvalidWorkflowError("the definition has another id", [problem])
    return document


async def _latest(services: Services, workspace: str, workflow_id: str) -> dict[str, object]:
    version, workflow = await services.catalog.latest(workspace, workflow_id)
    versions = await services.catalog.versions(workspace, workflow_id)
    return _view(workflow, version, versions[version])


def _view(workflow: Workflow, version: int, at_ms: int) -> dict[str, object]:
    return {**workflow.document, "version": version, "createdAt": timestamp(at_ms)}
