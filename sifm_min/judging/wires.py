"""The two wires, Gemini's generateContent and the OpenAI form: the body of a request, and the fields of a reply.

Nothing here opens a connection, and no key comes here.
"""

from .outcomes import as_dict, as_text, short

GEMINI_SCHEMA = "responseJsonSchema"                         # deprecated in favour of responseFormat, and still accepted
BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT",
           "IMAGE_RECITATION", "content_filter")
HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


# ------------------------------------------------------------------------------------------------------------- requests

def request_settings(spec, request, room):
    """The settings of a request: all of its body but texts, pictures and schema. A cache key needs them."""
    chosen = {**spec.generation}
    if request.seed is not None and "seed" in spec.profile.allowed:
        chosen["seed"] = request.seed
    if spec.provider == "openai":
        return {**chosen, spec.max_tokens_field: room, "stream": False}
    thinking = {name: chosen.pop(name) for name in ("thinkingBudget", "thinkingLevel") if name in chosen}
    return {"generationConfig": {"maxOutputTokens": room, **chosen, **({"thinkingConfig": thinking} if thinking else {})},
            "safetySettings": [{"category": f"HARM_CATEGORY_{harm}", "threshold": "BLOCK_NONE"} for harm in HARMS]}


def body(spec, request, parts, room):
    """The JSON body of a call. parts: ("text", text) or ("image", base64 of a PNG); room: tokens for the answer."""
    return (_gemini_body if spec.provider == "gemini" else _openai_body)(spec, request, parts, room)


def _gemini_body(spec, request, parts, room):
    rest = request_settings(spec, request, room)
    if request.schema and spec.structured != "none":
        rest["generationConfig"]["responseMimeType"] = "application/json"
        if spec.structured == "schema":
            rest["generationConfig"][GEMINI_SCHEMA] = request.schema
    content = [{"text": part} if kind == "text" else {"inlineData": {"mimeType": "image/png", "data": part}}
               for kind, part in parts]
    system = {"parts": [{"text": request.system}]}
    return {"systemInstruction": system, "contents": [{"role": "user", "parts": content}], **rest}


def _openai_body(spec, request, parts, room):
    content = [{"type": "text", "text": part} if kind == "text" else
               {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{part}"}} for kind, part in parts]
    rules = [{"role": "system", "content": request.system}]
    if spec.system_in_user:
        rules, content = [], [{"type": "text", "text": request.system}, *content]
    whole = {"model": spec.model, "messages": [*rules, {"role": "user", "content": content}],
             **request_settings(spec, request, room)}
    if request.schema and spec.structured != "none":
        whole["response_format"] = {"type": "json_object"} if spec.structured == "json_object" else {
            "type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": request.schema}}
    return whole


# -------------------------------------------------------------------------------------------------------------- replies

def reply(spec, answer):
    """The fields of an Answer from the JSON of a 200. A status of None means that there is a text to be read."""
    return (_gemini_reply if spec.provider == "gemini" else _openai_reply)(answer)


def _gemini_reply(answer):
    block = as_text(as_dict(answer.get("promptFeedback")).get("blockReason"))
    candidates = answer.get("candidates")
    candidate = as_dict(candidates[0]) if isinstance(candidates, list) and candidates else {}
    parts = as_dict(candidate.get("content")).get("parts")
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    texts = [as_text(part.get("text")) or "" for part in parts if not part.get("thought")]
    thoughts = "parts marked as thought" if any(part.get("thought") and as_text(part.get("text")) for part in parts) else None
    usage = as_dict(answer.get("usageMetadata"))
    tokens = _tokens(usage, prompt="promptTokenCount", cached="cachedContentTokenCount", output="candidatesTokenCount",
                     thoughts="thoughtsTokenCount", total="totalTokenCount")
    return _reply("".join(texts), as_text(candidate.get("finishReason")), block, bool(candidate), tokens, thoughts,
                  model_version=as_text(answer.get("modelVersion")), response_id=as_text(answer.get("responseId")),
                  model_status={k: short(v) for k, v in as_dict(answer.get("modelStatus")).items() if as_text(v)} or None)


def _openai_reply(answer):
    choices = answer.get("choices")
    choice = as_dict(choices[0]) if isinstance(choices, list) and choices else {}
    message = as_dict(choice.get("message"))
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(as_text(as_dict(part).get("text")) or "" for part in content)
    text = _without_thoughts(as_text(content) or "")
    thoughts = next((name for name in ("reasoning", "reasoning_content") if (as_text(message.get(name)) or "").strip()),
                    "a <think> block" if as_text(content) and content.strip() and not text.strip() else None)
    usage = as_dict(answer.get("usage"))
    reasoning = as_dict(usage.get("completion_tokens_details")).get("reasoning_tokens", 0)
    cached = as_dict(usage.get("prompt_tokens_details")).get("cached_tokens", 0)
    tokens = _tokens({**usage, "cached": cached, "reasoning": reasoning}, prompt="prompt_tokens", cached="cached",
                     output="completion_tokens", thoughts="reasoning", total="total_tokens")
    if tokens["output"] is not None and tokens["thoughts"] is not None:
        tokens["output"] = max(0, tokens["output"] - tokens["thoughts"])     # here it includes the reasoning
    reply = _reply(text, as_text(choice.get("finish_reason")), None, bool(choice), tokens, thoughts,
                   model_version=as_text(answer.get("model")), response_id=as_text(answer.get("id")),
                   fingerprint=as_text(answer.get("system_fingerprint")))
    if reply["status"] in (None, "empty") and (refusal := as_text(message.get("refusal"))):
        reply |= {"status": "refused_text", "text": refusal}
    return reply


def _reply(text, finish, block, candidate, tokens, thoughts, **rest):
    """The fields of an Answer, by the same rules for both wires. An unknown finish reason is abnormal: only STOP is an answer.

    thoughts: the place where the reply has its reasoning, or None. Reasoning is never read as an answer.
    """
    if block:
        status = "blocked_prompt"
    elif not candidate:
        status = "no_candidate"
    elif finish in BLOCKED:
        status = "blocked_output"
    elif finish in ("MAX_TOKENS", "length"):
        status = "truncated"
    elif finish not in ("STOP", "stop"):
        status = "abnormal_finish"
    else:
        status = None if text.strip() else "empty"
    fields = {"finish_reason": finish, "block_reason": block, **rest}
    fields = {name: short(value, 200) if isinstance(value, str) else value for name, value in fields.items()}
    remark = ""
    if thoughts and not text.strip() and status in ("empty", "truncated"):
        remark = f"the text is in {thoughts} alone, which is not read as an answer; " + (
            "raise max_output_tokens, or let the model think less" if status == "truncated" else
            "switch thinking off for this model, or have the server put the answer into its content")
    return {"status": status, "text": text, "tokens": tokens, "message": remark, **fields}


def _without_thoughts(text):
    """The text after a <think> block. Some templates open the block in the prompt; then only its end is in the text."""
    opened = text.lstrip().startswith("<think>")
    if opened or ("</think>" in text and not text.lstrip().startswith(("{", "```"))):
        return text.partition("</think>")[2]
    return text


def _tokens(usage, **names):
    """Token counts: whole numbers, else None. An absent count is zero if the total leaves no room for it."""
    def sane(value):
        return value if type(value) is int and value >= 0 else None
    counts = {name: sane(usage.get(wire)) for name, wire in names.items()}
    if names["cached"] not in usage:
        counts["cached"] = 0
    if counts["prompt"] is not None and counts["total"] == sum(counts[n] or 0 for n in ("prompt", "output", "thoughts")):
        counts |= {name: 0 for name in ("output", "thoughts") if names[name] not in usage}
    return counts
