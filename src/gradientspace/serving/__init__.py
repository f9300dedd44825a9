"""`gradientspace serve`: an OpenAI-compatible server that sends every prompt to its expert.

| module | what lives there |
|---|---|
| `command.py` | options, start and stop of the process |
| `app.py` | the HTTP routes, one screen each |
| `gate.py` | who may come in: API keys, size of the body |
| `protocol.py` | the shapes of OpenAI's requests, answers and errors |
| `routing.py` | prompt -> expert, off the event loop, the same for a whole conversation |
| `backend.py` | what a backend is: the interface of the two below |
| `local.py` | the built-in backend: micro-batches over stacked experts |
| `upstream.py` | the proxy in front of an engine that holds the adapters |
| `parity.py` | the self-test before the first request |
| `metrics.py` | Prometheus |
"""
