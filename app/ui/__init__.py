"""The page of `kinora ui`: the same `generate` as the command line, in a browser on this machine.

`desk` makes one request after the other, `view` turns events into what is shown, `fields` (of a
request) and `controls` (of a recipe) come from definitions, `form` turns what they hold into a
`Request`, `layout` and `page` are the page, `server` and `guard` serve it to this machine only.
gradio is imported when the page is served.
"""
