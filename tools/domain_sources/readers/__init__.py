"""One module a domain. A reader takes {package: archive path} and yields `SourceDocument`s of clean text."""
