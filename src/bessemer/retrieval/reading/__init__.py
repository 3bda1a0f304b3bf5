"""Reading of office files as Markdown with the page of each part: DOCX, PPTX, XLSX, and PDF with its layout.

`files` reads the files of a folder, each in a process with limits, and remembers what it read. `docx`, `pptx`, `xlsx` and
`pdf` read one file; `markdown` is what they write to. Of a PDF, `pdf_lines` finds lines, `pdf_order` their order, `pdf_tables`
ruled tables; `page_image` shows a page.
"""
