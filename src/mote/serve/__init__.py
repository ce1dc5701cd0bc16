"""Serving and exporting adapters: an OpenAI-compatible HTTP server with a chat page, export formats, a vLLM plugin.

A request travels `app` -> `completions` -> `chat_request` (parsed) -> `jobs` (queued on the running batch) ->
`answer_stream` (tokens to reasoning and content) -> back through `completions` in the types of `openai_schema`.
"""
