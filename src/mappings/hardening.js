// Runs once in each context that expressions run in, before any of them: takes away what upstream does
// not have or does not allow, and freezes the rest, so that no expression can leave anything behind.
(function (global) {
  'use strict';

  const kept = new Set([
    'AggregateError', 'Array', 'ArrayBuffer', 'BigInt', 'BigInt64Array', 'BigUint64Array', 'Boolean',
    'DataView', 'Date', 'Error', 'EvalError', 'Float32Array', 'Float64Array', 'Infinity', 'Int16Array',
    'Int32Array', 'Int8Array', 'JSON', 'Map', 'Math', 'NaN', 'Number', 'Object', 'Promise',
    'RangeError', 'ReferenceError', 'RegExp', 'Set', 'String', 'Symbol', 'SyntaxError', 'TypeError',
    'URIError', 'Uint16Array', 'Uint32Array', 'Uint8Array', 'Uint8ClampedArray', 'WeakMap', 'WeakSet',
    'decodeURI', 'decodeURIComponent', 'encodeURI', 'encodeURIComponent', 'isFinite', 'isNaN',
    'parseFloat', 'parseInt', 'undefined',
  ]);
  const blocked = [
    'eval', 'Function', 'require', 'module', 'exports', '__dirname', '__filename', 'global', 'globalThis',
    'process', 'setTimeout', 'setInterval', 'setImmediate', 'clearTimeout', 'clearInterval',
    'clearImmediate', 'console', '__proto__', '__defineGetter__', '__defineSetter__', '__lookupGetter__',
    '__lookupSetter__', 'constructor', 'import', 'importScripts', 'Reflect', 'Proxy', 'defineProperty',
    'getOwnPropertyDescriptor', 'getPrototypeOf', 'setPrototypeOf', 'escape', 'unescape',
  ];

  const roots = [
    function () {}, () => {}, function* () {}, async function () {}, async function* () {},
    [][Symbol.iterator](), ''[Symbol.iterator](), new Map()[Symbol.iterator](),
    new Set()[Symbol.iterator](), ''.matchAll(/a/g), (function* () {})(), (async function* () {})(),
    (function () { return arguments; })(), Promise.resolve(),
  ];

  for (const name of Object.getOwnPropertyNames(global)) {
    if (!kept.has(name)) delete global[name];
  }

  // Behind the global object rather than in it, so that a source of the same name hides it.
  const blockers = Object.create(Object.prototype);
  for (const name of blocked) {
    const message = `'${name}' is disabled for security reasons in this sandboxed environment`;
    Object.defineProperty(blockers, name, { value: () => { throw new TypeError(message); } });
  }
  Object.setPrototypeOf(global, blockers);

  const seen = new Set([global]);
  const waiting = [...roots, blockers];
  for (const name of Object.getOwnPropertyNames(global)) {
    waiting.push(global[name]);
    Object.defineProperty(global, name, { writable: false, configurable: false });
  }
  while (waiting.length > 0) {
    const item = waiting.pop();
    if (item === null || (typeof item !== 'object' && typeof item !== 'function') || seen.has(item)) {
      continue;
    }
    seen.add(item);
    waiting.push(Object.getPrototypeOf(item));
    for (const key of [...Object.getOwnPropertyNames(item), ...Object.getOwnPropertySymbols(item)]) {
      const property = Object.getOwnPropertyDescriptor(item, key);
      waiting.push(property.value, property.get, property.set);
    }
    if (!ArrayBuffer.isView(item)) Object.freeze(item);
  }
})(this);
