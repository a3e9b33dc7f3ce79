"""`kinora ui`: the jobs of `pipelines.jobs` on a page and over HTTP, for this machine by default.

`fields` (of a request) and `controls` (of a recipe) come from definitions, `form` turns what they
hold into a `Request` and back, `layout` has the components, `page` and `history` say what they do,
`seen` and `view` turn jobs into what is shown, `gallery` finds the videos on disk. `wire` and `api`
speak OpenAI's shape; `guard` stands before every route, `server` serves them all. gradio is
imported when that happens.
"""
