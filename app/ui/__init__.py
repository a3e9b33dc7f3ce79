"""The page of `kinora ui`: the same `generate` as the command line, in a browser on this machine.

`desk` makes one request after the other, `view` turns events into what is shown, `controls` and
`form` turn definitions into fields and fields into a `Request`, `layout` and `page` are the page,
`server` and `guard` serve it to this machine only. gradio is imported when the page is served.
"""
