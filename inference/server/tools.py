"""Tools: which of them a request offers, whether one must be called, and what the model called."""

import json
import uuid
from dataclasses import dataclass

from inference.server.errors import ApiError
from inference.server.protocol import ChatRequest, Function, ToolChoice


@dataclass(frozen=True)
class Offer:
    """The functions that a model may call (none: it may not), and whether it must call one."""

    functions: tuple[Function, ...] = ()
    is_forced: bool = False


def offer_of(request: ChatRequest) -> Offer:
    """What `tools` and `tool_choice` say together. Raises ApiError for what is contradictory or not there."""
    if request.functions:
        raise ApiError(400, "functions were replaced in 2023: use tools and tool_choice", param="functions")
    functions = {tool.function.name: tool.function for tool in request.tools or []}
    if len(functions) < len(request.tools or []):
        raise ApiError(400, "two tools have the same name: give each function a name of its own", param="tools")
    choice = request.tool_choice
    if choice is not None and choice != "none" and not functions:
        raise ApiError(400, "tool_choice needs tools: there are none in this request", param="tool_choice")
    if choice == "none" or not functions:
        return Offer()
    if choice in (None, "auto"):
        return Offer(tuple(functions.values()))
    if choice == "required":
        return Offer(tuple(functions.values()), is_forced=True)
    names, is_forced = _names(choice)
    if not names:
        raise ApiError(400, "tool_choice names no function", param="tool_choice")
    for name in names:
        if name not in functions:
            known = ", ".join(functions)
            raise ApiError(400, f"tool_choice names {name!r}, but tools has only {known}", param="tool_choice")
    return Offer(tuple(functions[name] for name in dict.fromkeys(names)), is_forced)


def _names(choice: ToolChoice) -> tuple[list[str], bool]:
    if choice.type == "function":
        return [choice.function.name] if choice.function else [], True
    if choice.allowed_tools is None:
        return [], False
    return [tool.function.name for tool in choice.allowed_tools.tools], choice.allowed_tools.mode == "required"


def described(function: Function) -> dict:
    """A function as the prompt shows it, in OpenAI's form."""
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


def parse_call(text: str, offer: Offer) -> dict | None:
    """The text between the tags as a tool call of OpenAI's; None if it is no call of a function that is offered."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in [function.name for function in offer.functions]:
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
