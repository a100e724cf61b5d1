"""A page of HTML, read and checked by the standard library."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "wbr", "hr", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order; gathers ids, links, tags and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.texts = [], [], [], [], []
        self.loaded = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        target = attrs.get("href") or attrs.get("xlink:href") or attrs.get("src") or ""
        self.links += [target[1:]] if target.startswith("#") else []
        self.loaded += (
            [] if target.startswith(("#", "data:")) or not target else [target]
        )
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(" ".join(data.split()))
