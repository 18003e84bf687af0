"""A page opened in a browser, for the tests of pages."""

from __future__ import annotations

import json

from benchmarks.browser import set_size


class Page:
    """An open page: what it shows, what it asked for, and its controls."""

    def __init__(self, driver, path, width: int = 1280):
        self.driver, self.path, self.width = driver, path, width
        self.touched = False
        driver.shown = self
        for log in ("browser", "performance"):
            driver.get_log(log)
        set_size(driver, width, 900)
        driver.get(path.as_uri())

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def choose(self, name: str, value: str) -> None:
        self.touched = True
        self.js(
            "const select = document.querySelector(`[name=${arguments[0]}]`); select.value = arguments[1];"
            "if (select.value !== arguments[1]) throw Error(`no option ${arguments[1]}`);"
            "select.dispatchEvent(new Event('input', {bubbles: true}));",
            name,
            value,
        )

    def click(self, selector: str) -> None:
        self.touched = True
        element = self.driver.find_element("css selector", selector)
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def rows(self, section: str = "points") -> list[list[str]]:
        """Text of every cell, with all rows shown."""
        while self.js("const more = document.querySelector(`#${arguments[0]} .more`); return !more.hidden", section):
            self.click(f"#{section} .more")
        return self.js(
            "return [...document.querySelectorAll(`#${arguments[0]} .table tbody tr`)]"
            ".map(row => [...row.cells].map(cell => cell.innerText))",
            section,
        )

    def search(self, text: str) -> None:
        self.touched = True
        self.driver.find_element("name", "text").send_keys(text)

    def column(self, title: str, section: str = "points") -> list[str]:
        index = self.titles(section).index(title)
        return [row[index].split("\n")[0] for row in self.rows(section)]

    def titles(self, section: str = "points") -> list[str]:
        headings = "return [...document.querySelectorAll(`#${arguments[0]} .table th`)].map(cell => cell.textContent)"
        return self.js(headings, section)

    def sort_by(self, title: str, section: str = "points") -> str | None:
        index = self.titles(section).index(title) + 1
        self.click(f"#{section} th:nth-child({index}) button")
        heading = self.driver.find_element("css selector", f"#{section} th:nth-child({index})")
        return heading.get_attribute("aria-sort")

    def drawn(self, section: str, opacity: float | None = None) -> int:
        """Marks and bars with a size in the picture itself."""
        return self.js(
            "return [...document.querySelectorAll(`#${arguments[0]} .chart svg .points path`)]"
            ".filter(mark => mark.getBoundingClientRect().width > 0)"
            ".filter(mark => [null, +mark.closest('.trace').style.opacity].includes(arguments[1])).length",
            section,
            opacity,
        )

    def caption(self, section: str) -> str:
        return self.driver.find_element("css selector", f"#{section} figcaption").text

    def text(self, selector: str) -> str:
        return self.driver.find_element("css selector", selector).text

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # The browser's own start page may still be loading when the page is opened.
        return [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome:")]
