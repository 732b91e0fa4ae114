"""GET /: the server's page for a browser. It loads nothing from elsewhere."""

from html import escape
from string import Template

FRONT_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}

LINKS = (
    ("docs", "every route, to read and to try"),
    ("v1/models", "the model and its adapters, as OpenAI lists them"),
    ("adapters", "the adapters: where they are, and what may be wrong with them"),
    ("info", "the model and the limits of this server"),
    ("health", "200 if a generation would succeed now"),
    ("metrics", "Prometheus metrics, which <code>loraplex top</code> shows in a terminal"),
    ("openapi.json", "the routes for programs"),
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>loraplex</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; }
pre { padding: 1rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: .5rem;
      overflow-x: auto; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
</style>
</head>
<body>
<h1>loraplex</h1>
<p>$serves</p>
<dl>
$links
</dl>
<p>Ask it something:</p>
<pre>$example</pre>
<p>OpenAI's clients take <code>${url}v1</code> as their base URL, LoRAX's clients take <code>$url</code>.
gRPC has a port of its own: 50051, unless <code>--grpc-port</code> says otherwise.</p>
</body>
</html>
""")

EXAMPLE = Template("""curl ${url}v1/chat/completions -H 'Content-Type: application/json' \\${key}
  -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'""")

KEY = "\n  -H 'Authorization: Bearer KEY' \\"


def front_page(model: str, url: str) -> str:
    """`model` is empty for a server with API keys, which says nothing about itself without one. `url` is the server's
    URL in the browser, with a slash at the end."""
    return PAGE.substitute(
        serves=f"Serves <b>{escape(model)}</b> and LoRA adapters on it." if model else "This server requires API keys.",
        links="\n".join(f'<dt><a href="{path}">/{path}</a></dt><dd>{text}</dd>' for path, text in LINKS),
        example=escape(EXAMPLE.substitute(url=url, key="" if model else KEY), quote=False),
        url=escape(url),
    )
