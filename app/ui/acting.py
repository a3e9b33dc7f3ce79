"""HTML with buttons that tell what they are for."""

from __future__ import annotations

import gradio as gr

# What is asked first is asked for some seconds, also where the list is drawn anew meanwhile.
_ACTING = """
let asked = null, timer;
const mark = () => element.querySelectorAll('[data-sure]').forEach(button => {
  button.dataset.label ??= button.textContent;
  button.textContent = button.dataset.id === asked ? button.dataset.sure : button.dataset.label;
});
const ask = id => {
  clearTimeout(timer);
  asked = id;
  mark();
  if (id !== null) timer = setTimeout(ask, 5000, null);
};
watch('value', mark);
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  // The second half of a double click may fall on what has come under the pointer meanwhile.
  if (!button || event.detail > 1) return;
  const sure = button.dataset.id === asked || !button.dataset.sure;
  ask(sure ? null : button.dataset.id);
  if (!sure) return;
  element.dataset.acted = button.dataset.id;
  trigger('click', {act: button.dataset.act, id: button.dataset.id});
});
"""


def acting(name: str, content: str = "") -> gr.HTML:
    """HTML whose buttons with `data-act` trigger a click that says which and of what.

    One with `data-sure` says that first, and does something where it is pressed once more.
    """
    return gr.HTML(content, elem_id=name, js_on_load=_ACTING)


def acted(name: str) -> str:
    """JavaScript for what the button that was pressed last is of."""
    return f"document.querySelector('#{name} [data-acted]').dataset.acted"


def grey_when_pressed(button: gr.Button) -> None:
    """Grey `button` before a press of it is answered, since another one then would be lost.

    To be called before its press is connected to what makes it ready again.
    """
    grey = "() => ({__type__: 'update', interactive: false})"
    button.click(None, None, button, js=grey, api_visibility="private", queue=False)


def said(event: gr.EventData, name: str) -> str:
    """What a click says of itself; it may come from anybody."""
    data = event._data  # pyright: ignore[reportPrivateUsage]
    found = data.get(name, "") if isinstance(data, dict) else ""
    return found if isinstance(found, str) else ""
