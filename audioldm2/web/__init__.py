"""A web page for generating sounds, made with Gradio (the extra "web"); `audioldm2 serve` starts it.

- `requests`: the values of a request, their limits and checks.
- `studio`: generations, one at a time, that can be stopped.
- `files`: the sounds and pictures that a visitor gets, and the sounds that one uploads.
- `form`: the fields of the page.
- `page`: the page: the form, the results and the history.
- `api`: the same for programs, over HTTP.
- `server`: starting and ending Gradio's server.
"""
