// Lists the operations of /openapi.json, without anything from the internet.
const make = (tag, text = '', children = []) => {
  const element = Object.assign(document.createElement(tag), { textContent: text });
  element.append(...children);
  return element;
};
const row = (cells, tag = 'td') => make('tr', '', cells.map((cell) => make(tag, cell)));
const api = await (await fetch('/openapi.json')).json();

function type(schema = {}) {
  if (schema.$ref) return schema.$ref.split('/').pop();
  if (schema.anyOf) return schema.anyOf.map(type).join(' or ');
  if (schema.type === 'array') return `list of ${schema.items ? type(schema.items) : 'values'}`;
  if (schema.format === 'binary') return 'an audio file';
  return schema.enum?.join(', ') ?? schema.type ?? 'any';
}

document.getElementById('example').textContent =
  `curl '${location.origin}/api/search?q=a+dog+barks&top=5'\n` +
  `curl --data-binary @clip.wav '${location.origin}/api/search/audio?name=clip.wav'`;
for (const [path, methods] of Object.entries(api.paths))
  for (const [method, operation] of Object.entries(methods)) {
    const rows = (operation.parameters ?? []).map((given) =>
      row([given.name, type(given.schema), given.required ? 'required' : `default ${JSON.stringify(given.schema.default)}`, given.description ?? '']));
    const body = operation.requestBody?.content ?? {};
    for (const [kind, { schema }] of Object.entries(body)) rows.push(row(['body', kind, 'required', type(schema)]));
    const answers = Object.values(operation.responses['200']?.content ?? {}).map(({ schema }) => type(schema));
    document.getElementById('operations').append(
      make('h2', `${method.toUpperCase()} ${path}`),
      make('p', operation.description + (answers[0] && answers[0] !== 'any' ? ` Answer: ${answers[0]}.` : '')),
      ...(rows.length ? [make('table', '', [row(['name', 'type', '', 'meaning'], 'th'), ...rows])] : []),
    );
  }
document.getElementById('operations').append(make('h2', 'Types'));
for (const [name, schema] of Object.entries(api.components.schemas)) {
  if (/ValidationError/.test(name)) continue;
  const rows = Object.entries(schema.properties ?? {}).map(([field, kind]) => row([field, type(kind), kind.description ?? '']));
  document.getElementById('operations').append(make('h2', name), make('p', schema.description ?? ''), make('table', '', rows));
}
